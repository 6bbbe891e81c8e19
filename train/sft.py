"""Supervised fine-tuning: turn a base model into a chat model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
import statistics
from pathlib import Path

from hotlap.common.checks import TOO_LARGE
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.config import Shape
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, open_model
from hotlap.model.weights import stage as stage_of
from hotlap.train.config import DPOConfig, SFTConfig, TuneConfig
from hotlap.train.data.conversation_rows import conversation_digests, conversation_rows
from hotlap.train.data.conversations import check_parts, conversations_of, download_conversations
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.preference_rows import PairRows
from hotlap.train.data.rows import PackedRows
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.schedule import rows_in_all, stage_rows
from hotlap.train.stage import Stage, check_machine, closing, evaluated_aside, opened, row_batches, train


def fine_tune(config: SFTConfig) -> dict[str, float]:
    """Fine-tune on all ranks, and return the last metrics."""
    config = config.validate()
    parts = parts_of(config.data)
    check_parts(parts)
    with joined() as world, evaluated_aside(config, world) as config:
        base, shape, tokenizer = open_model(config.base)
        check_machine(config, world, shape)
        if config.lora_rank and stage_of(base) == "pretrain":
            raise ValueError(
                f"lora_rank={config.lora_rank}, but {config.base} is a base model, which has never seen the "
                "tokens that mark turns, and adapters leave its embeddings and head as they are; fine-tune "
                "it without --lora-rank first"
            )
        with world.main_first("download the conversations"):
            if world.is_main:
                download_conversations(parts)
        rows, held_out = read_rows(config, tokenizer, shape.context, world)
        trained, validated = conversation_digests(rows), conversation_digests(held_out)
        if same := len(set(trained) & set(validated)):
            log.info("%d conversations are in both the training and the validation split", same)
        rows.batch(0, 1)  # find errors in the data before creating the run
        steps = max(config.loop.steps, epoch_steps(config, rows))
        stage = Stage(
            "sft", shape, tokenizer, next_token_loss,
            batches=row_batches(rows, config, steps, world),
            evaluate=lambda model, at_once: validation(model, held_out, tokenizer, at_once, world),
            data=hashlib.sha256(b"".join(trained)).hexdigest(), source=" ".join(config.data),
            about=f"{len(trained)} conversations in {rows.epoch_rows()} rows, {passes(config, rows, steps)}, "
            f"{len(validated)} to validate",
            loop=dataclasses.replace(config.loop, steps=steps), base=base,
        )  # fmt: skip
        with opened(config, world, lambda: check_tokenizer(config.out / TOKENIZER, tokenizer)):
            return train(config, stage, world)


def read_rows(config: SFTConfig, tokenizer: Tokenizer, T: int, world: World) -> tuple[PackedRows, PackedRows]:
    """Packed rows of the conversations that train, and of those that validate."""
    from tqdm import tqdm

    parts = parts_of(config.data)
    conversations = tqdm(
        conversations_of(parts, config.seed), printable(" ".join(config.data)), unit=" conversations",
        unit_scale=True, disable=None if world.is_main else True, leave=False,
    )  # fmt: skip
    rows = conversation_rows(conversations, tokenizer, T, config.seed, parts)
    return rows["train"], rows["validation"]


def epoch_steps(config: SFTConfig | DPOConfig, rows: PackedRows | PairRows) -> int:
    """Steps that cover every row config.epochs times, given the batch size of each schedule stage."""
    rows_a_step = statistics.fmean(stage_rows(config.schedule, config.batch_rows))
    steps = config.epochs * rows.epoch_rows() / rows_a_step
    if steps >= TOO_LARGE:
        raise ValueError(f"epochs={config.epochs:g} are {steps:g} steps, and at most 2^63 can be counted")
    return math.ceil(steps)


def passes(config: SFTConfig | DPOConfig, rows: PackedRows | PairRows, steps: int) -> str:
    """The epochs that a run of so many steps makes, in words."""
    epochs = rows_in_all(config.schedule, config.batch_rows, steps) / rows.epoch_rows()
    return f"{'at most ' if config.loop.minutes else ''}{epochs:.1f} epochs"


def open_chat_model(config: TuneConfig) -> tuple[Path, Shape, Tokenizer]:
    """The folder, shape and tokenizer of the base. ValueError if it is no chat model."""
    base, shape, tokenizer = open_model(config.base)
    if stage_of(base) == "pretrain":
        raise ValueError(
            f"--base {config.base} is a base model, which does not converse; fine-tune it with `hotlap sft`"
        )
    return base, shape, tokenizer


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Save the base model's tokenizer in the run; a resumed run must have the same."""
    if not path.exists():
        tokenizer.save(path)
    elif (saved := Tokenizer.load(path)).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} has sha256 {saved.sha256[:12]}..., the base tokenizer {tokenizer.sha256[:12]}...; "
            "resume with the --base that the run started from"
        )


def main(config: SFTConfig) -> None:
    """`hotlap sft`."""
    last = fine_tune(config)
    print(closing(config, last, f"chat with it: python chat.py {shlex.quote(str(config.out))}"))

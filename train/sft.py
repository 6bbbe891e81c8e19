"""Supervised fine-tuning: from a base model to one that answers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from hotlap.common import options
from hotlap.common.log import log
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, open_model
from hotlap.train.data.conversations import (
    conversation_digests,
    conversation_rows,
    conversations_of,
    download_conversations,
)
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.sources import SPLITS
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all, stage_rows
from hotlap.train.stage import Stage, StageConfig, check_machine, opened, row_batches, train


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Fine-tune a base model on conversations."""

    out: Path = Path("runs/sft")
    base: Path = Path("runs/pretrain")
    """Run or model directory to start from."""
    data: str = "tasks"
    """tasks (facts, sums, spelling, greetings), smoltalk (which is downloaded) with the tasks, or a .jsonl or
    .parquet file of {"messages": [...]} lines or rows."""
    epochs: float = 0.0
    """Passes over the conversations, at least: more steps than loop.steps where those are fewer passes."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            warmup_steps=0, warmdown=0.5, final_lr=0.0, momentum_warmup_steps=300
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(500))

    def validate(self) -> SFTConfig:
        super().validate()
        if not 0 <= self.epochs < float("inf"):
            raise ValueError(f"epochs={self.epochs} must be 0 (loop.steps alone count) or more")
        return self


def fine_tune(config: SFTConfig) -> dict[str, float]:
    """Run the fine-tuning that config describes, on all ranks, and return its last metrics."""
    config = config.validate()
    with joined() as world:
        check_machine(config, world)
        base, shape, tokenizer = open_model(config.base)
        with world.leader_first(f"download {config.data}"):
            if world.leads:
                download_conversations(config.data)
        rows, held_out = (split_rows(split, config, tokenizer, shape.context, world) for split in SPLITS)
        trained, validated = conversation_digests(rows), conversation_digests(held_out)
        if same := len(set(trained) & set(validated)):
            log.info("%d conversations are in training and in validation", same)
        rows.batch(0, 1)  # so that what is wrong with the data shows before anything is made
        steps = max(config.loop.steps, epoch_steps(config, rows))
        epochs = rows_in_all(config.schedule, config.batch_rows, steps) / rows.epoch_rows()
        stage = Stage(
            "sft", shape, tokenizer, next_token_loss,
            batches=row_batches(rows, config, steps, world),
            evaluate=lambda model, at_once: validation(model, held_out, tokenizer, at_once, world),
            data=hashlib.sha256(b"".join(trained)).hexdigest(), source=config.data,
            about=f"{len(trained)} conversations in {rows.epoch_rows()} rows, {epochs:.1f} epochs",
            loop=dataclasses.replace(config.loop, steps=steps), base=base,
        )  # fmt: skip
        with opened(config, world, lambda: check_tokenizer(config.out / TOKENIZER, tokenizer)):
            return train(config, stage, world)


def split_rows(split: str, config: SFTConfig, tokenizer: Tokenizer, T: int, world: World) -> PackedRows:
    """The rows of a split of the conversations; those that are trained on are shuffled."""
    from tqdm import tqdm

    conversations = tqdm(
        conversations_of(split, config.data, config.seed), split, unit=" conversations", unit_scale=True,
        disable=None if world.leads else True, leave=False,
    )  # fmt: skip
    return conversation_rows(conversations, tokenizer, T, config.seed, shuffle=split == "train")


def epoch_steps(config: SFTConfig, rows: PackedRows) -> int:
    """Steps in which each row is seen config.epochs times; stages count as long as they are."""
    rows_a_step = statistics.fmean(stage_rows(config.schedule, config.batch_rows))
    return math.ceil(config.epochs * rows.epoch_rows() / rows_a_step)


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """The run's tokenizer is the base model's, and stays so when the run is resumed."""
    if not path.exists():
        tokenizer.save(path)
    elif (saved := Tokenizer.load(path)).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} has sha256 {saved.sha256[:12]}..., the base tokenizer {tokenizer.sha256[:12]}...; "
            "resume a run with the base that it started from"
        )


def main(arguments: list[str]) -> None:
    """`hotlap sft`."""
    config = options.parse(SFTConfig, arguments, command="sft")
    fine_tune(config)
    print(f"talk to it: python chat.py {config.out}")

"""Pretraining: from text to a base model."""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from hotlap.model import tokenizer as tokenizers
from hotlap.model.config import GPTConfig
from hotlap.model.errors import DataError
from hotlap.model.flops import causal_flops, nanochat_flops, parameter_counts
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.data import PackedRows, packed_rows, prefetch, step_batches
from hotlap.train.dist import World, joined
from hotlap.train.evaluate import validation
from hotlap.train.log import log
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import next_token_loss
from hotlap.train.memory import check_memory, device_bytes, largest_that_fits, micro_batch_rows, rank_bytes
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.parallel import Recompute, compiles, materialize, parallelize
from hotlap.train.report import write_report
from hotlap.train.runs import compute_dtype, open_run, resume_from, run_lock, use_fp8
from hotlap.train.schedule import ScheduleConfig, rows_in_all, rows_share, stage_rows
from hotlap.train.shards import (  # fmt: skip
    fingerprint,
    shard_paths,
    write_shards,
)
from hotlap.train.sources import split_documents

MOST_EPOCHS = 4  # that a timed run reads little data: more are worth less and less (Muennighoff et al., 2023)
CHARACTERS_PER_PIECE = 10_000  # of a document that the tokenizer learns from at a time


@dataclass(frozen=True)
class PretrainConfig:
    """Train a base model on text."""

    out: Path = Path("runs/pretrain")
    """Directory of the run: configuration, metrics, checkpoints and report."""
    data: str = "pydocs"
    """pydocs (Python's own documentation), shakespeare, text or .jsonl files, or a folder of shards."""
    tokenizer: str = "bpe"
    """bpe (of `model.vocab_size`) or characters, learnt from the data; gpt2; or a tokenizer.json."""
    batch_rows: int = 16
    """Rows of `model.context` tokens in a step."""
    micro_batch: str = "all"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    recompute: Recompute = "none"
    """Activations that are computed again for the backward pass, to save memory: none, of each block, or
    (selective) all but products and attention.
    """
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(1000))
    validation_tokens: int = 0
    """Tokens that a validation reads, from the start of the split; 0 is all."""
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """What the model computes in. auto: bfloat16 where the device is fast at it. fp8: its large products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU always, on a CPU for runs long enough to earn it back."""
    resume: str = "no"
    """Go on with a run: auto (from its newest checkpoint that is whole), or the path of a checkpoint."""

    @property
    def tokens(self) -> int:
        """Tokens of the run, if it ends by its steps."""
        return rows_in_all(self.schedule, self.batch_rows, self.loop.steps) * self.model.context

    def validate(self) -> PretrainConfig:
        if self.batch_rows < 1 or self.validation_tokens < 0:
            raise ValueError("batch_rows must be at least 1, validation_tokens 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        self.model.validate()
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.minutes)
        return self


def pretrain(config: PretrainConfig, profile: bool = False, warm_up: bool = False) -> dict[str, float]:
    """Run the pretraining that config describes, on all ranks, and return its last metrics.

    warm_up: compile before the clock starts, on steps that are undone.
    """
    config = config.validate()
    with joined() as world, ExitStack() as stack:
        common_rows = math.gcd(*stage_rows(config.schedule, config.batch_rows))
        micro_rows = micro_batch_rows(config.micro_batch, common_rows, world)
        dtype = compute_dtype(config.dtype, world.device)
        with world.leader_first(f"open {config.out}"):
            if world.leads:
                stack.enter_context(run_lock(config.out))
                open_run(config.out, config, config.resume != "no")
            tokenizer, folder = prepare(config)
        vocab_size = -(-tokenizer.vocab_size // 64) * 64  # sizes that products like
        shape = dataclasses.replace(config.model, vocab_size=vocab_size)
        train, held_out = (
            packed_rows(folder, split, tokenizer, shape.context, config.seed, limit)
            for split, limit in (("train", 0), ("validation", config.validation_tokens))
        )
        if len(train.shards) == 1 and train.epoch_rows() == 1:
            raise DataError(
                f"{folder} has no more to train on than one row of model.context={shape.context} tokens; "
                "bring more text, or lower --model.context"
            )
        loop = ended_by_data(config, train)
        train.batch(0, 1)  # so that what is wrong with the data shows before the model is built
        with torch.device("meta"):
            model = GPT(shape, dtype)
        use_fp8(model, config.dtype)
        parallelize(model, world, config.recompute, compiles(config.compile, world.device, config.loop.steps))
        check_memory(model, world, micro_rows)
        materialize(model, world.device, config.seed)
        optimizer = MuonAdamW(model, config.optim)
        start, state = resume_from(config.out, config.resume, model, optimizer, world)
        data_id = fingerprint([*shard_paths(folder, "train"), *shard_paths(folder, "validation")])
        if state and state.get("data") != data_id:
            raise ValueError(f"{config.out} was started on other data than {folder} holds now")
        if config.micro_batch == "auto":
            micro_rows = largest_that_fits(model, common_rows, world)
        describe(model, config, train, world, micro_rows)
        evaluate = partial(validation, model, held_out, tokenizer, micro_rows, world)
        batches = step_batches(
            train, batch_rows=config.batch_rows, micro_rows=micro_rows, start=start, rank=world.rank,
            world=world.size, share=rows_share(config.schedule, config.loop.steps),
        )  # fmt: skip
        last = fit(
            loop, config.schedule, model, optimizer, tokenizer, prefetch(batches),
            next_token_loss, world=world, run=config.out, start=start,
            state=state | {"stage": "pretrain", "data": data_id}, evaluate=evaluate, profile=profile,
            warm_up=warm_up,
        )  # fmt: skip
        if world.leads:
            write_report(config.out)
        return last


def prepare(config: PretrainConfig) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the folder with the shards: the one that was named, or one made in the run."""
    path = config.out / TOKENIZER
    if Path(config.data).is_dir() and list(Path(config.data).glob("*.bin")):
        folder = Path(config.data)
        if not path.exists():
            beside = folder / TOKENIZER
            named = config.tokenizer not in ("bpe", "characters")
            if not named and not beside.exists():
                raise FileNotFoundError(f"no {beside}; name the tokenizer of these shards by --tokenizer")
            (named_tokenizer(config.tokenizer) if named else Tokenizer.load(beside)).save(path)
        return Tokenizer.load(path), folder
    folder = config.out / "data"
    if not (folder / TOKENIZER).exists():  # written last
        train, held_out = split_documents(config.data)
        tokenizer = make_tokenizer(config.tokenizer, config.model.vocab_size, train, train + held_out)
        write_data(folder, train, held_out, tokenizer)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    tokenizer.save(path)
    return tokenizer, folder


def write_data(folder: Path, train: list[str], held_out: list[str], tokenizer: Tokenizer) -> None:
    """Shards of both splits, and at last the tokenizer that they were made with."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [
        write_shards(folder, split, texts, tokenizer)
        for split, texts in (("train", train), ("validation", held_out))
    ]
    tokenizer.save(folder / TOKENIZER)
    log.info("%s: %s tokens to train on, %s to validate", folder, *(f"{n:,}" for n in counts))


def make_tokenizer(kind: str, vocab_size: int, train: list[str], everything: list[str]) -> Tokenizer:
    """A tokenizer learnt from the training text, or a named one. Characters also come from the validation
    text.
    """
    if kind == "characters":
        return tokenizers.train_characters("".join(sorted(set().union(*everything))))
    if kind != "bpe":
        return named_tokenizer(kind)
    pieces = (t[i : i + CHARACTERS_PER_PIECE] for t in train for i in range(0, len(t), CHARACTERS_PER_PIECE))
    tokenizer = tokenizers.train_bpe(pieces, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log.info("the text has merges for %d tokens only, not %d", tokenizer.vocab_size, vocab_size)
    return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
    return tokenizers.gpt2() if name == "gpt2" else Tokenizer.load(name)


def ended_by_data(config: PretrainConfig, rows: PackedRows) -> LoopConfig:
    """The loop, which in a timed run ends after MOST_EPOCHS of a corpus of one shard, if not before."""
    if not config.loop.minutes or len(rows.shards) > 1:
        return config.loop
    steps = math.ceil(MOST_EPOCHS * rows.epoch_rows() / config.batch_rows)
    return dataclasses.replace(config.loop, steps=min(config.loop.steps, steps))


def describe(model: GPT, config: PretrainConfig, rows: PackedRows, world: World, micro_rows: int) -> None:
    """Log what is about to run: parameters, FLOPs, tokens, and the memory of each rank."""
    counts, T = parameter_counts(model), model.config.context
    length = f"{config.loop.minutes:g} minutes or {ended_by_data(config, rows).steps:,} steps"
    if not config.loop.minutes:
        epochs = config.tokens / T / rows.epoch_rows() if len(rows.shards) == 1 else None
        length = f"{config.tokens / 1e6:.2f}M tokens" + (f" ({epochs:.1f} epochs)" if epochs else "")
    log.info(
        "%s: %.2fM parameters (%.2fM in products), %.1f MFLOP a token (%.1f causal), %s, %s on %s%s",
        config.out, counts["total"] / 1e6, (counts["matrices"] + counts["head"]) / 1e6,
        nanochat_flops(model, T) / 1e6, causal_flops(model, T) / 1e6, length,
        str(model.compute_dtype).removeprefix("torch."), f"{world.size} x " if world.size > 1 else "",
        world.device.type,
    )  # fmt: skip
    parts = rank_bytes(model, world, micro_rows)
    log.info(
        "about %.2f of %.1f GB on each rank with %d rows at once: %s",
        sum(parts.values()) / 1e9, device_bytes(world) / 1e9, micro_rows,
        ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
    )  # fmt: skip


if __name__ == "__main__":  # torchrun -m hotlap.train.pretrain
    from hotlap.cli import main

    raise SystemExit(main(["pretrain", *sys.argv[1:]]))

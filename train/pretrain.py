"""Pretraining: from text to a base model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from hotlap.common.errors import DataError
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.train.data.prepare import prepare
from hotlap.train.data.rows import PackedRows, packed_rows, prefetch, step_batches
from hotlap.train.data.shards import fingerprint, shard_paths
from hotlap.train.distributed.memory import (
    check_memory,
    largest_that_fits,
    micro_batch_rows,
)
from hotlap.train.distributed.sharding import (
    Recompute,
    compiles,
    compute_dtype,
    materialize,
    parallelize,
    use_fp8,
)
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all, rows_share, stage_rows
from hotlap.train.run.folder import open_run, resume_from, run_lock
from hotlap.train.run.report import write_report
from hotlap.train.stage import describe

MOST_EPOCHS = 4  # that a timed run reads little data: more are worth less and less (Muennighoff et al., 2023)


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
            tokenizer, folder = prepare(config.out, config.data, config.tokenizer, config.model.vocab_size)
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
        describe(model, config.out, length(config, train), world, micro_rows)
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


def ended_by_data(config: PretrainConfig, rows: PackedRows) -> LoopConfig:
    """The loop, which in a timed run ends after MOST_EPOCHS of a corpus of one shard, if not before."""
    if not config.loop.minutes or len(rows.shards) > 1:
        return config.loop
    steps = math.ceil(MOST_EPOCHS * rows.epoch_rows() / config.batch_rows)
    return dataclasses.replace(config.loop, steps=min(config.loop.steps, steps))


def length(config: PretrainConfig, rows: PackedRows) -> str:
    if config.loop.minutes:
        return f"{config.loop.minutes:g} minutes or {ended_by_data(config, rows).steps:,} steps"
    epochs = config.tokens / config.model.context / rows.epoch_rows() if len(rows.shards) == 1 else None
    return f"{config.tokens / 1e6:.2f}M tokens" + (f" ({epochs:.1f} epochs)" if epochs else "")

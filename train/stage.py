"""What every stage of training does alike: pretraining, fine-tuning, and those that come.

A stage is a config that inherits from StageConfig, and a function that reads its data and hands a `Stage` to
`train`. What differs between stages is in the `Stage`: its batches, its loss, its validation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch

from hotlap.common.log import log
from hotlap.model.config import GPTConfig
from hotlap.model.flops import causal_flops, nanochat_flops, parameter_counts
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import load_weights
from hotlap.train.data.rows import Batch, PackedRows, made_ahead, step_batches
from hotlap.train.distributed.memory import (
    check_memory,
    device_bytes,
    largest_that_fits,
    micro_batch_rows,
    rank_bytes,
)
from hotlap.train.distributed.sharding import (
    Dtype,
    Recompute,
    compiles,
    compute_dtype,
    materialize,
    parallelize,
    use_fp8,
)
from hotlap.train.distributed.world import World
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import Loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, rows_share, stage_rows
from hotlap.train.run.folder import open_run, resume_from, run_lock
from hotlap.train.run.report import write_report

T = TypeVar("T")


@dataclass(frozen=True)
class StageConfig:
    """The fields that all stages share."""

    out: Path
    """Directory of the run: configuration, metrics, checkpoints and report."""
    batch_rows: int = 16
    """Rows of the model's context in a step."""
    micro_batch: str = "all"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    recompute: Recompute = "none"
    """Activations to recompute in the backward pass, to save memory: none, of each block, or (selective) all
    but matmuls and attention.
    """
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(1000))
    seed: int = 0
    dtype: Dtype = "auto"
    """What the model computes in. auto: bfloat16 where the device is fast at it. fp8: its large matmuls."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU always, on a CPU for runs long enough to earn it back."""
    profile: bool = False
    """Write a trace of a few steps, and on a GPU of its memory."""
    resume: str = "no"
    """Resume the run: auto (from its newest intact checkpoint), or the path of a checkpoint."""

    def validate(self: T) -> T:
        """Return self, or raise ValueError naming the first field that cannot work."""
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows={self.batch_rows} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.minutes)
        return self


@dataclass(frozen=True)
class Stage:
    """What one stage brings to training."""

    name: str
    """As a checkpoint knows it: a base model (pretrain) is not asked questions."""
    shape: GPTConfig
    tokenizer: Tokenizer
    loss: Loss
    batches: Callable[[GPT, int, int], Iterator[list[Batch]]]
    """Of the model, the first step and the rows of a micro-batch: this rank's micro-batches of each step."""
    evaluate: Callable[[GPT, int], dict[str, float]] | None
    """Of the model and the rows that it reads at once: metrics that begin with validation_, of all ranks."""
    data: str
    """Identity of the data, which a resumed run has to have, too."""
    source: str
    """What the user calls the data."""
    about: str
    """What is trained on, for the log."""
    loop: LoopConfig
    """config.loop, or what the data makes of it."""
    base: Path | None = None
    """Model directory to start from; None starts from the seed."""


def check_machine(config: StageConfig, world: World) -> None:
    """ValueError where this machine or number of ranks cannot run the config, before anything is made."""
    micro_batch_rows(config.micro_batch, common_rows(config), world)
    compute_dtype(config.dtype, world.device)


def common_rows(config: StageConfig) -> int:
    """Rows that micro-batches have to divide: those of the steps of all of the schedule's stages."""
    return math.gcd(*stage_rows(config.schedule, config.batch_rows))


@contextmanager
def opened(config: StageConfig, world: World, prepare: Callable[[], T]) -> Iterator[T]:
    """Own the run's directory, and yield what prepare() returns: on rank 0 first, then on the others."""
    with ExitStack() as stack:
        with world.leader_first(f"open {config.out}"):
            if world.leads:
                stack.enter_context(run_lock(config.out))
                open_run(config.out, config, config.resume != "no")
            prepared = prepare()
        yield prepared


def train(config: StageConfig, stage: Stage, world: World, warm_up: bool = False) -> dict[str, float]:
    """Build the model, train it in the opened run, write the report, and return the last metrics.

    warm_up: compile before the clock starts, on steps that are undone.
    """
    micro_rows = micro_batch_rows(config.micro_batch, common_rows(config), world)
    with torch.device("meta"):
        model = GPT(stage.shape, compute_dtype(config.dtype, world.device))
    use_fp8(model, config.dtype)
    parallelize(model, world, config.recompute, compiles(config.compile, world.device, stage.loop.steps))
    check_memory(model, world, micro_rows)
    materialize(model, world.device, config.seed)
    if stage.base is not None:
        load_weights(model, stage.base)
    optimizer = MuonAdamW(model, config.optim)
    state = resume_from(config.out, config.resume, model, optimizer, world)
    if state.step and state.data != stage.data:
        raise ValueError(f"{config.out} was started on other data than {stage.source} holds now")
    if config.micro_batch == "auto":

        def one_row() -> Batch:
            return next(stage.batches(model, state.step, 1))[0].to(world.device)

        micro_rows = largest_that_fits(model, common_rows(config), world, stage.loss, one_row)
    describe(model, config.out, stage.about, world, micro_rows)
    last = fit(
        stage.loop, config.schedule, model, optimizer, stage.tokenizer,
        stage.batches(model, state.step, micro_rows), stage.loss, world=world, run=config.out,
        state=dataclasses.replace(state, stage=stage.name, data=stage.data),
        evaluate=stage.evaluate and (lambda: stage.evaluate(model, micro_rows)),
        profile=config.profile, warm_up=warm_up,
    )  # fmt: skip
    if world.leads:
        write_report(config.out)
    return last


def row_batches(
    rows: PackedRows, config: StageConfig, steps: int, world: World
) -> Callable[[GPT, int, int], Iterator[list[Batch]]]:
    """Stage.batches of packed rows: made ahead of time by a thread. steps: of the whole run."""

    def batches(model: GPT, start: int, micro_rows: int) -> Iterator[list[Batch]]:
        found = step_batches(
            rows, batch_rows=config.batch_rows, micro_rows=micro_rows, start=start, rank=world.rank,
            world=world.size, share=rows_share(config.schedule, steps),
        )  # fmt: skip
        return made_ahead(found, world.device)

    return batches


def describe(model: GPT, out: Path, about: str, world: World, micro_rows: int) -> None:
    """Log what is about to run: parameters, FLOPs, data, and the memory of each rank."""
    counts, T = parameter_counts(model), model.config.context
    log.info(
        "%s: %.2fM parameters (%.2fM in matmuls), %.1f MFLOP a token (%.1f causal), %s, %s on %s%s",
        out, counts["total"] / 1e6, (counts["matrices"] + counts["head"]) / 1e6,
        nanochat_flops(model, T) / 1e6, causal_flops(model, T) / 1e6, about,
        str(model.compute_dtype).removeprefix("torch."), f"{world.size} x " if world.size > 1 else "",
        world.device.type,
    )  # fmt: skip
    parts = rank_bytes(model, world, micro_rows)
    log.info(
        "about %.2f of %.1f GB on each rank with %d rows at once: %s",
        sum(parts.values()) / 1e9, device_bytes(world) / 1e9, micro_rows,
        ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
    )  # fmt: skip

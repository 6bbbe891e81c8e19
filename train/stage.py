"""What all training stages share: pretraining, fine-tuning, and stages still to come.

A stage consists of a config that inherits from StageConfig and a function that reads the data and passes a
`Stage` to `train`. The `Stage` holds what differs between stages: batches, loss and validation.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from hotlap.common.log import log
from hotlap.common.process import keep_freed_memory
from hotlap.common.terminal import printable
from hotlap.kernels.fp8 import check_fp8
from hotlap.model.adapter_files import weights_sha256
from hotlap.model.build import build
from hotlap.model.config import Shape
from hotlap.model.flops import causal_flops, nanochat_flops, parameter_counts
from hotlap.model.lora import LoRA, adapter_count, add_adapters, check_rank
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.model.weights import lineage, load_weights, model_folder, run_checkpoints
from hotlap.train.config import LoopConfig, StageConfig, TuneConfig
from hotlap.train.data.preference_rows import PairRows
from hotlap.train.data.rows import Batch, PackedRows, prefetched, step_batches
from hotlap.train.distributed.memory import (
    check_memory,
    device_bytes,
    largest_micro_batch,
    micro_batch_rows,
    rank_bytes,
)
from hotlap.train.distributed.sharding import (
    compute_dtype,
    materialize,
    parallelize,
    should_compile,
    use_fp8,
)
from hotlap.train.distributed.world import World
from hotlap.train.loop import fit
from hotlap.train.losses import Loss
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import rows_share, stage_rows
from hotlap.train.run.changes import check_origin, continued
from hotlap.train.run.folder import open_run, origin, run_lock, write_config, write_machine
from hotlap.train.run.metrics import METRICS, as_line
from hotlap.train.run.report import write_report
from hotlap.train.run.resume import resume_from
from hotlap.train.run.retention import mark_needed
from hotlap.train.run.state import RunState
from hotlap.train.run.trackers import check_tracker

T = TypeVar("T")
Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Stage:
    """What a stage passes to `train`."""

    name: str
    """Recorded in checkpoints: a model whose stage is pretrain is not asked questions."""
    shape: Shape
    tokenizer: Tokenizer
    loss: Loss
    batches: Callable[[Transformer, RunState, int], Iterator[list[Batch]]]
    """(model, what the run has done, rows of a micro-batch) -> this rank's micro-batches of each step to
    come."""
    evaluate: Callable[[Transformer, int], dict[str, float]] | None
    """(model, rows per forward pass) -> metrics over all ranks, with names that begin with validation_."""
    data: str
    """Fingerprint of the data; a resumed run must have the same."""
    source: str
    """The user's name for the data."""
    about: str
    """The data in a few words, for the log."""
    loop: LoopConfig
    """config.loop, with its steps adapted to the data."""
    base: Path | None = None
    """Model directory to start from; None starts from random weights."""
    prepare: Callable[[Transformer, int], None] | None = None
    """(model with the weights of the base, rows of a micro-batch): what the batches need of the base, before
    anything is trained or loaded; collective."""
    one_row: Callable[[Transformer], Batch] | None = None
    """(model) -> a row to measure a pass by, where drawing the first of `batches` would write to the run."""


def check_machine(config: StageConfig, world: World, shape: Shape | None = None) -> None:
    """Raise ValueError or ImportError if this machine or number of ranks cannot run the config. Creates
    nothing.

    shape: of the model, if it is known, to check the memory.
    """
    rows = micro_batch_rows(config.micro_batch, common_rows(config), world)
    if shape:
        check_rank(shape, lora_rank(config))
        check_memory(
            shape, world, step_rows=config.batch_rows * config.sequences,
            micro_rows=rows * config.sequences, recompute=config.recompute, dtype=config.dtype,
            lora_rank=lora_rank(config),
        )  # fmt: skip
    if config.dtype == "fp8":
        check_fp8(world.device)
    check_tracker(config.tracker)


def lora_rank(config: StageConfig) -> int:
    """Of the adapters that are trained; 0 where all weights are."""
    return config.lora_rank if isinstance(config, TuneConfig) else 0


def common_rows(config: StageConfig) -> int:
    """Rows that micro-batches must divide: the greatest common divisor over the schedule's stages."""
    return math.gcd(*stage_rows(config.schedule, config.batch_rows))


@contextmanager
def evaluated_aside(config: Config, world: World) -> Iterator[Config]:
    """The config itself; with eval_only, that of a run in a temporary folder, which is resumed from what is
    to be validated. It is beside the run's, so that all nodes see it.
    """
    if not config.eval_only:
        yield config
        return
    start = config.resume
    if start in ("no", "auto"):
        start = str(config.out) if run_checkpoints(config.out) else "no"
    with ExitStack() as stack:
        folder = None
        if threading.current_thread() is threading.main_thread():  # else SIGTERM would leave the folder there
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, before)
        if world.is_main:
            beside = config.out.parent if os.access(config.out.parent, os.W_OK) else None
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".eval-", dir=beside))
        folder = Path(world.gather(folder)[0])
        yield dataclasses.replace(config, out=folder / config.out.name, resume=start)


@contextmanager
def opened(config: StageConfig, world: World, prepare: Callable[[], T]) -> Iterator[T]:
    """Lock the run's directory and yield what prepare() returns. Rank 0 calls it first, then the others.

    After an error before anything was prepared or trained, a new directory is deleted.
    """
    new = not config.out.exists()
    with ExitStack() as stack:
        stack.push(partial(delete_unused, config.out, new and world.is_main))
        with world.main_first(f"open {config.out}"):
            if world.is_main:
                stack.enter_context(run_lock(config.out))
                open_run(config.out, config, config.resume != "no")
                if config.resume not in ("no", "auto"):
                    check_origin(model_folder(config.resume), config)
            prepared = prepare()
        yield prepared


def delete_unused(run: Path, new: bool, kind: type[BaseException] | None, *_: object) -> None:
    """Delete a new run's directory after an error, unless it holds data or a step."""
    failed = kind is not None and issubclass(kind, Exception)
    if new and failed and not any((run / name).exists() for name in (METRICS, "data")):
        shutil.rmtree(run, ignore_errors=True)


def train(config: StageConfig, stage: Stage, world: World, warm_up: bool = False) -> dict[str, float]:
    """Build the model, train it in an opened run, write the report, and return the last metrics.

    warm_up: compile before the clock starts, on steps that are undone.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    check_machine(config, world, stage.shape)
    micro_rows = micro_batch_rows(config.micro_batch, common_rows(config), world)
    with torch.device("meta"):
        model = build(stage.shape, compute_dtype(config.dtype, world, stage.shape.width))
    if lora_rank(config):
        base = stage.base.resolve()
        sha256 = world.together(lambda: weights_sha256(lineage(base)) if world.is_main else None)[0]
        add_adapters(model, LoRA(config.lora_rank, config.lora_alpha, (base,), sha256))
    use_fp8(model, config.dtype)
    compile = should_compile(config.compile, world.device)
    parallelize(model, world, config.recompute, compile)
    materialize(model, world.device, config.seed)
    if stage.base is not None:
        load_weights(model, stage.base)
    optimizer = MuonAdamW(model, config.optim)
    if config.micro_batch == "auto":

        def one_row() -> Batch:
            found = stage.one_row(model) if stage.one_row else next(stage.batches(model, RunState(), 1))[0]
            return found.to(world.device)

        micro_rows = largest_micro_batch(
            model, common_rows(config), world, stage.loss, one_row, config.sequences
        )
    if stage.prepare:
        stage.prepare(model, micro_rows)
    start = world.together(lambda: origin(config.out, config.resume))[0]
    state = resume_from(
        config.out, start, model, optimizer, world,
        accept=lambda folder, manifest, state: (
            state if config.eval_only else continued(folder, manifest, state, config, stage)
        ),
    )  # fmt: skip
    if config.eval_only:
        return validated(model, stage, micro_rows, state)
    current = dataclasses.replace(config, resume=start)  # what a run that is stopped goes on with

    def record() -> None:
        if world.is_main:
            write_config(config.out, current)
            if model.lora:
                mark_needed(model.lora.bases[0], config.out)
            if not state.finished:  # what was measured earlier keeps its device and date
                write_machine(config.out, world.device, world.size)

    world.together(record)
    describe(model, config.out, stage.about, world, micro_rows * config.sequences)
    last = fit(
        stage.loop, config.schedule, model, optimizer, stage.tokenizer,
        stage.batches(model, state, micro_rows), stage.loss, world=world, run=config.out,
        state=dataclasses.replace(state, stage=stage.name, data=stage.data),
        evaluate=stage.evaluate and (lambda: stage.evaluate(model, micro_rows)),
        profile=config.profile, tracker=config.tracker, warm_up=warm_up,
    )  # fmt: skip
    if world.is_main:
        write_report(config.out)
    return last


def validated(model: Transformer, stage: Stage, micro_rows: int, state: RunState) -> dict[str, float]:
    """The validation of a model as it is used, with the step that it has been trained to; collective."""
    if stage.evaluate is None:
        raise ValueError(f"{stage.source} has nothing to validate on, which --eval-only asks for")
    if not state.step:
        log.info("no step is taken yet: these are %s", stage.base or "random weights")
    model.set_windows(1.0)
    return {"steps": state.step, **stage.evaluate(model, micro_rows)}


def closing(config: StageConfig, last: dict[str, float], text: str) -> str:
    """What a command prints at its end: a text, or with eval_only the validation, as a line of JSON."""
    return as_line(last).strip() if config.eval_only else printable(text)


def row_batches(
    rows: PackedRows | PairRows, config: StageConfig, steps: int, world: World
) -> Callable[[Transformer, int, int], Iterator[list[Batch]]]:
    """Stage.batches from packed rows, prefetched by a thread. steps: of the whole run."""

    def batches(model: Transformer, state: RunState, micro_rows: int) -> Iterator[list[Batch]]:
        found = step_batches(
            rows, batch_rows=config.batch_rows, micro_rows=micro_rows, start=state.step,
            first=state.tokens // rows.row_tokens, rank=world.rank, world=world.size,
            share=rows_share(config.schedule, steps),
        )  # fmt: skip
        return prefetched(found, world.device)

    return batches


def describe(model: Transformer, out: Path, about: str, world: World, micro_rows: int) -> None:
    """Log parameters, FLOPs, data, and the memory needed on each rank. micro_rows: sequences of a pass."""
    counts, T = parameter_counts(model), model.config.context
    log.info(
        "%s: %.2fM parameters (%.2fM in matmuls), %.1f MFLOP per token (%.1f causal), %s, %s on %s%s",
        out, counts["total"] / 1e6, counts["matmul"] / 1e6,
        nanochat_flops(model, T) / 1e6, causal_flops(model, T) / 1e6, about,
        str(model.compute_dtype).removeprefix("torch."), f"{world.size} x " if world.size > 1 else "",
        world.device.type,
    )  # fmt: skip
    if model.lora:
        log.info(
            "training adapters of rank %d, %.2fM parameters, beside %s",
            model.lora.rank, adapter_count(model.config, model.lora.rank) / 1e6, model.lora.bases[0],
        )  # fmt: skip
    parts = rank_bytes(model, world, micro_rows)
    log.info(
        "estimated memory: %.2f of %.1f GB per rank with micro-batches of %d sequences: %s",
        sum(parts.values()) / 1e9, device_bytes(world) / 1e9, micro_rows,
        ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
    )  # fmt: skip

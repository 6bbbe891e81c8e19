"""`hotlap bench training`: what a training step takes on this device, and where its time goes.

Steps are those of the training loop: batches come from a shard of tokens, packed by documents and prefetched.
The tokens are random and the documents as long as FineWeb's.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hotlap.bench import results
from hotlap.bench.models import ROWS, model_config
from hotlap.bench.peaks import log_warnings
from hotlap.bench.timing import NO_TIME, Timing, deadline, start_afresh, synchronize
from hotlap.kernels.dispatch import default_device, fast_dtype, kernel_choice
from hotlap.model.config import GPTConfig
from hotlap.model.flops import causal_flops, mfu, nanochat_flops, peak_flops
from hotlap.model.gpt import GPT
from hotlap.train.data import Batch, PackedRows, prefetch, shard_documents, step_batches, write_shard
from hotlap.train.log import log
from hotlap.train.losses import next_token_loss
from hotlap.train.optim import MuonAdamW, OptimConfig

PHASES = ("data_wait", "forward", "backward", "optimizer")
KERNELS = ("rms_norm", "rotary", "relu2")  # that a training step uses
UNTIMED = 2  # steps before those that are measured
MEDIAN_DOCUMENT, SPREAD = 400, 1.04  # lognormal lengths in tokens, with FineWeb's median and mean
BOS = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Measure training steps on random tokens: tokens/s, MFU, memory, and the time of each part, the wait for
    data too.
    """

    models: tuple[str, ...] = ()
    """Of tiny, 124m, d12, d20 and d24; none is tiny on a CPU, and all but tiny on a GPU."""
    rows: int = 0
    """Rows of the model's context in a step; 0 is a usual number."""
    steps: int = 10
    """Steps that are measured, after two that are not."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block. auto: on a GPU."""
    without: bool = False
    """Where Triton kernels are in use, measure again with each of them switched off: what it is worth."""
    minutes: float = 0
    """Start nothing new after so many minutes, and list what was left out; 0 is no limit."""
    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""


def bench_training(config: TrainingConfig) -> list[dict]:
    """Measure each model, write training.json and .csv, and return the rows. Out of memory is a row too."""
    if config.steps < 1 or config.rows < 0:
        raise ValueError(f"steps={config.steps} must be at least 1 and rows={config.rows} 0 or more")
    end, device = deadline(config.minutes), default_device()
    on_gpu = device.type == "cuda"
    names = config.models or (("124m", "d12", "d20", "d24") if on_gpu else ("tiny",))
    shapes = {name: model_config(name) for name in names}
    log_warnings(device)
    folder = config.out or results.device_folder(device)
    rows = []
    for name, shape in shapes.items():
        count = config.rows or ROWS[name]
        compiled = on_gpu if config.compile == "auto" else config.compile == "on"
        for off in ("", *(KERNELS if config.without and kernel_choice(device.type) == "triton" else ())):
            start_afresh(device)
            provider = f"hotlap without {off}" if off else "hotlap"
            row = {"case": f"{name} {count}x{shape.context}", "provider": provider}
            try:
                if time.monotonic() > end:
                    row |= {"ms": None, "note": NO_TIME}
                else:
                    with switched_off(off):
                        row |= measure_training(shape, count, config.steps, compiled, device)
            except torch.OutOfMemoryError:
                row |= {"ms": None, "note": "out of memory; give fewer --rows"}
            rows.append(row)
            log.info("%s", results.as_line(row))
            path = results.save("training", rows, folder, device)
    log.info("written to %s", path)
    return rows


@contextlib.contextmanager
def switched_off(name: str):
    """Let one file of kernels use torch; no name switches nothing off."""
    if not name:
        yield
        return
    module = importlib.import_module(f"hotlap.kernels.{name}")
    before = module.use_triton
    module.use_triton = lambda x: False
    try:
        yield
    finally:
        module.use_triton = before


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # or blocks would run without being compiled
def measure_training(shape: GPTConfig, count: int, steps: int, compiled: bool, device) -> dict:
    """One model: median milliseconds of a step and its parts, throughput, utilisation and peak memory."""
    with torch.device("meta"):
        model = GPT(shape, fast_dtype(device.type))
    model.to_empty(device=device).init_weights()
    optimizer = MuonAdamW(model, OptimConfig())
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with random_batches(shape, count, steps + UNTIMED) as batches:
        seconds = [step_seconds(model, optimizer, batches, device) for _ in range(UNTIMED + steps)]
    first, samples = sum(seconds[0]), seconds[UNTIMED:]
    whole = Timing.of([sum(sample) for sample in samples])
    parts = {
        f"{phase}_ms": 1e3 * Timing.of(list(seconds)).median
        for phase, seconds in zip(PHASES, zip(*samples, strict=True), strict=True)
    }
    speed = count * shape.context / whole.median
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    peak = peak_flops(device)
    return {
        "ms": 1e3 * whole.median,
        "ms_low": 1e3 * whole.low,
        "ms_high": 1e3 * whole.high,
        **parts,
        "tokens_per_second": speed,
        "mfu_nanochat": mfu(nanochat_flops(model), speed, peak),
        "mfu_causal": mfu(causal_flops(model), speed, peak),
        "tflops": nanochat_flops(model) * speed / 1e12,
        "memory_gb": memory,
        "first_step_s": first,
        "compiled": compiled,
    }


@contextlib.contextmanager
def random_batches(shape: GPTConfig, count: int, steps: int) -> Iterator[Iterator[list[Batch]]]:
    """Batches of `count` rows for so many steps, from a shard in a temporary folder by the way that training
    takes.
    """
    random = np.random.default_rng(0)
    length = (steps + 4) * count * shape.context  # the loader reads ahead
    tokens = random.integers(1, shape.vocab_size, length)
    documents = random.lognormal(np.log(MEDIAN_DOCUMENT), SPREAD, length // MEDIAN_DOCUMENT)
    starts = np.cumsum(2 + documents.astype(int))
    tokens[starts[starts < length]] = tokens[0] = BOS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_000000.bin")
        write_shard(path, tokens, shape.vocab_size)
        rows = PackedRows([partial(shard_documents, path, shape.vocab_size, BOS)], shape.context, seed=0)
        with contextlib.closing(prefetch(step_batches(rows, batch_rows=count, micro_rows=count))) as batches:
            yield batches


def step_seconds(
    model: GPT, optimizer: MuonAdamW, batches: Iterator[list[Batch]], device
) -> tuple[float, ...]:
    """Seconds of one step: the wait for its batch on the device, forward pass, backward pass, optimiser."""
    synchronize(device)
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    (batch,) = next(batches)
    batch = batch.to(device)
    mark()
    loss = next_token_loss(model, batch) / batch.inputs.numel()
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad()
    mark()
    return tuple(b - a for a, b in itertools.pairwise(marks))

"""`hotlap bench training`: what a training step takes on this device, and where its time goes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.bench import results
from hotlap.bench.models import ROWS, model_config
from hotlap.bench.timing import Timing, synchronize
from hotlap.kernels.dispatch import default_device, fast_dtype, kernel_choice
from hotlap.model.config import GPTConfig
from hotlap.model.flops import causal_flops, mfu, nanochat_flops, peak_flops
from hotlap.model.gpt import GPT
from hotlap.train.log import log
from hotlap.train.optim import MuonAdamW, OptimConfig

PHASES = ("forward", "backward", "optimizer")
KERNELS = ("rms_norm", "rotary", "relu2")  # that a training step uses


@dataclass(frozen=True)
class TrainingConfig:
    """Measure training steps on random tokens: tokens/s, MFU, memory, and the time of each part."""

    models: tuple[str, ...] = ()
    """Of tiny, 124m, d12, d20 and d24; none is tiny on a CPU, and all but tiny on a GPU."""
    rows: int = 0
    """Rows of the model's context in a step; 0 is a usual number."""
    steps: int = 10
    """Steps that are measured, after two that are not."""
    compile: bool | None = None
    """torch.compile each block; by default on a GPU."""
    without: bool = False
    """Where Triton kernels are in use, measure again with each of them switched off: what it is worth."""
    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""


def bench_training(config: TrainingConfig) -> list[dict]:
    """Measure each model, write training.json and .csv, and return the rows. Out of memory is a row too."""
    if config.steps < 1 or config.rows < 0:
        raise ValueError(f"steps={config.steps} must be at least 1 and rows={config.rows} 0 or more")
    device = default_device()
    on_gpu = device.type == "cuda"
    names = config.models or (("124m", "d12", "d20", "d24") if on_gpu else ("tiny",))
    shapes = {name: model_config(name) for name in names}
    rows = []
    for name, shape in shapes.items():
        count = config.rows or ROWS[name]
        compiled = on_gpu if config.compile is None else config.compile
        for off in ("", *(KERNELS if config.without and kernel_choice(device.type) == "triton" else ())):
            provider = f"hotlap without {off}" if off else "hotlap"
            row = {"case": f"{name} {count}x{shape.context}", "provider": provider}
            try:
                with switched_off(off):
                    row |= measure_training(shape, count, config.steps, compiled, device)
            except torch.OutOfMemoryError:
                row |= {"ms": None, "note": "out of memory"}
                torch.cuda.empty_cache()
            rows.append(row)
            log.info("%s", "  ".join(f"{k} {results.shown(v)}" for k, v in row.items()))
    path = results.save("training", rows, config.out or results.device_folder(device), device)
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
    torch._dynamo.reset()  # or compiled blocks would go on with the kernels
    try:
        yield
    finally:
        module.use_triton = before
        torch._dynamo.reset()


def measure_training(shape: GPTConfig, count: int, steps: int, compiled: bool, device) -> dict:
    """One model: median milliseconds of a step and its parts, throughput, utilisation and peak memory."""
    with torch.device("meta"):
        model = GPT(shape, fast_dtype(device.type))
    model.to_empty(device=device).init_weights()
    optimizer = MuonAdamW(model, OptimConfig())
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator(device).manual_seed(0)
    shape_of_ids = (2, count, shape.context + 1)
    batches = torch.randint(shape.vocab_size, shape_of_ids, generator=generator, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    step_seconds(model, optimizer, batches[0], device)
    first = time.perf_counter() - began
    step_seconds(model, optimizer, batches[1], device)
    samples = [step_seconds(model, optimizer, batches[i % 2], device) for i in range(steps)]
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


def step_seconds(model: GPT, optimizer: MuonAdamW, tokens: torch.Tensor, device) -> tuple[float, ...]:
    """Seconds of the forward pass, the backward pass and the optimiser of one step."""
    synchronize(device)
    marks = [time.perf_counter()]
    loss = model(tokens[:, :-1], tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()
    synchronize(device)
    marks.append(time.perf_counter())
    loss.backward()
    synchronize(device)
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    marks.append(time.perf_counter())
    return tuple(b - a for a, b in itertools.pairwise(marks))

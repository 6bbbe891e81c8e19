"""`hotlap bench training`: how long a training step takes on this device, and where the time goes.

Under torchrun it measures the step of all ranks. Steps are those of the training loop: batches are packed
from a token shard and prefetched. Tokens are random; document lengths are distributed as in FineWeb.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hotlap.bench import plots, results
from hotlap.bench.cases import (
    NO_TIME,
    OUT_OF_MEMORY,
    Budget,
    Stopwatch,
    compiled_or_failed,
    failure,
    start_afresh,
)
from hotlap.bench.config import TrainingConfig
from hotlap.bench.models import MEDIAN_DOCUMENT, NANOCHAT_MFU, ROWS, SPREAD, model_config
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.common.memory import require_memory
from hotlap.common.process import keep_freed_memory
from hotlap.common.timing import Timing
from hotlap.kernels.dispatch import default_device, fast_dtype, kernel_choice
from hotlap.kernels.fp8 import check_fp8
from hotlap.model.build import build
from hotlap.model.config import Shape
from hotlap.model.flops import causal_flops, mfu, nanochat_flops, peak_flops
from hotlap.model.transformer import Transformer
from hotlap.train.data.rows import Batch, PackedRows, prefetched, step_batches
from hotlap.train.data.shards import shard_documents, write_shard
from hotlap.train.distributed.memory import row_bytes
from hotlap.train.distributed.sharding import local, materialize, parallelize, set_gradient_sync
from hotlap.train.distributed.world import World, joined
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.passes import Passes

PHASES = ("data_wait", "passes", "optimizer")
KERNELS = (
    "attention",
    "embedding",
    "linear_relu2",
    "linear_cross_entropy",
    "muon",
    "orthogonalize",
    "qkv",
    "rms_norm",
)
INSIDE = ("relu2",)  # used in place of one of them that is switched off
UNTIMED = 2  # warm-up steps
BOS = 0

Batches = Callable[[Shape, int, int, World], AbstractContextManager[Iterator[list[Batch]]]]


def bench_training(config: TrainingConfig) -> list[dict]:
    """Measure each model, write training.json, .csv and .png, and return the rows. A model that fails, for
    example out of memory, has a row that says so.
    """
    config.validate()
    if config.fp8:
        check_fp8(default_device())
    budget = Budget(config.minutes)
    on_gpu = default_device().type == "cuda"
    names = config.models or (("d12", "124m", "d24", "d20") if on_gpu else ("tiny",))
    shapes = {name: model_config(name) for name in names}
    for name, shape in shapes.items():
        check_sizes(name, shape, config.rows or 1, config.micro_batches * config.steps, config.fp8)
    variants: list[tuple[str, tuple[str, ...]]] = [("", ())]
    if config.without and kernel_choice("cuda" if on_gpu else "cpu") == "triton":
        variants += [(name, (name,)) for name in KERNELS]
        variants += [("any kernel", (*KERNELS, *INSIDE))]
    rows: list[dict] = []
    with joined() as world:
        path = results.open_file("training", config.out, world.device) if world.is_main else None
        if path:
            log_warnings(world.device)
        for label, off in variants:  # first all models with all kernels
            provider = f"hotlap without {label}" if label else "hotlap"
            for name, shape in shapes.items():
                for row in bench_model(name, shape, off, config, budget, world, path):
                    rows.append({"case": row.pop("case"), "provider": provider, **row})
                    log.info("%s", results.as_line(rows[-1]))
                    if path:
                        results.save(path, rows, world.device)
    if path:
        plots.draw(path, partial(plots.training, PHASES))
        log.info("written to %s", path)
    return rows


def check_sizes(name: str, shape: Shape, rows: int, passes: int, fp8: bool = False) -> None:
    """Raise ValueError if a pass of this many rows, or the tokens of all passes, cannot be in memory."""
    each = row_bytes(shape, "none", "fp8" if fp8 else "auto")
    require_memory(f"{name} with --rows {rows}", rows * each, "lower --rows", default_device())
    tokens = f"the random tokens of {passes} passes with --rows {rows}"
    require_memory(tokens, 8 * passes * rows * shape.context, "lower --rows, --steps or --micro-batches")


def bench_model(
    name: str,
    shape: Shape,
    off: tuple[str, ...],
    config: TrainingConfig,
    budget: Budget,
    world: World,
    path: Path | None,
) -> Iterator[dict]:
    """A model's row, with the kernels in `off` switched off. If `config.rows` is 0, rows for larger numbers
    of rows that ran out of memory come first.

    path: of the results, on the rank that writes them.
    """
    count = config.rows or ROWS[name]
    compiled = world.device.type == "cuda" if config.compile == "auto" else config.compile == "on"
    while count:
        start_afresh(world.device)
        passes = f"{config.micro_batches}x" if config.micro_batches > 1 else ""
        case = {"case": f"{name} {passes}{count}x{shape.context}{' fp8' if config.fp8 else ''}"}
        if world.size > 1:
            case["case"] += f" on {world.size} ranks"
        if world.total(budget.fits())[0] < world.size:
            yield case | {"ms": None, "note": NO_TIME}
            return
        note = ""
        try:
            with switched_off(off):
                found = measure_training(
                    shape, count, config.steps, compiled, world, random_batches,
                    config.micro_batches, config.fp8,
                )  # fmt: skip
        except Exception as error:  # recorded as the model's row; the other models still run
            if world.size > 1:
                raise  # the other ranks wait for this one
            note = failure(error)
            results.write_traceback(path.parent, f"training {case['case']}")
        if not note:
            reached, target = found["mfu_nanochat"], NANOCHAT_MFU.get(name)
            yield case | found | {"over_nanochats_mfu": reached / target if reached and target else None}
            return
        yield case | {"ms": None, "note": note}
        count = count // 2 if note == OUT_OF_MEMORY and not config.rows else 0


@contextlib.contextmanager
def random_batches(shape: Shape, count: int, steps: int, world: World) -> Iterator[Iterator[list[Batch]]]:
    """This rank's batches of `count` rows for `steps` steps, read from a temporary shard as training does."""
    random = np.random.default_rng(0)
    together = count * world.size
    length = (steps + 4) * together * shape.context  # the loader reads ahead
    tokens = random.integers(1, shape.vocab_size, length)
    documents = random.lognormal(np.log(MEDIAN_DOCUMENT), SPREAD, length // MEDIAN_DOCUMENT)
    starts = np.cumsum(2 + documents.astype(int))
    tokens[starts[starts < length]] = tokens[0] = BOS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_000000.bin")
        write_shard(path, tokens, shape.vocab_size)
        rows = PackedRows([partial(shard_documents, path, shape.vocab_size, BOS)], shape.context, seed=0)
        steps_ = step_batches(rows, batch_rows=together, micro_rows=count, rank=world.rank, world=world.size)
        with contextlib.closing(prefetched(steps_, world.device)) as batches:
            yield batches


@contextlib.contextmanager
def switched_off(names: tuple[str, ...]) -> Iterator[None]:
    """Let these kernel modules use plain torch."""
    modules = [importlib.import_module(f"hotlap.kernels.{name}") for name in names]
    before = [module.use_triton for module in modules]
    for module in modules:
        module.use_triton = lambda x: False
    try:
        yield
    finally:
        for module, use_triton in zip(modules, before, strict=True):
            module.use_triton = use_triton


@compiled_or_failed()
def measure_training(
    shape: Shape,
    count: int,
    steps: int,
    compiled: bool,
    world: World,
    batches_of: Batches = random_batches,
    micro: int = 1,
    fp8: bool = False,
) -> dict[str, float | bool | None]:
    """Measure a model with `micro` passes of `count` rows per step on each rank: median milliseconds of a
    step and its parts, throughput, MFU, and this rank's peak memory.
    """
    device = world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, optimizer = made(shape, compiled, fp8, world)
    if device.type == "cpu":
        keep_freed_memory()
    with batches_of(shape, count, micro * (steps + UNTIMED), world) as batches:
        passes = Passes(model, next_token_loss)
        first = step_seconds(passes, optimizer, batches, micro, UNTIMED, world)
        samples = step_seconds(passes, optimizer, batches, micro, steps, world)
    whole = Timing.of([sum(sample) for sample in samples])
    parts = {
        f"{phase}_ms": 1e3 * Timing.of(list(seconds)).median
        for phase, seconds in zip(PHASES, zip(*samples, strict=True), strict=True)
    }
    speed = world.size * micro * count * shape.context / whole.median
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    peak, each = peak_flops(device), speed / world.size
    return {
        "ms": 1e3 * whole.median,
        "ms_low": 1e3 * whole.low,
        "ms_high": 1e3 * whole.high,
        **parts,
        "ranks": world.size,
        "tokens_per_second": speed,
        "mfu_nanochat": mfu(nanochat_flops(model), each, peak),
        "mfu_causal": mfu(causal_flops(model), each, peak),
        "tflops": nanochat_flops(model) * each / 1e12,
        "memory_gb": memory,
        "first_step_s": sum(first[0]),  # compilation, mostly
        "compiled": compiled,
    }


def made(shape: Shape, compiled: bool, fp8: bool, world: World) -> tuple[Transformer, MuonAdamW]:
    """A model and its optimizer, built as in training."""
    with torch.device("meta"):
        model = build(shape, fast_dtype(world.device.type, shape.width))
    if fp8:
        model.use_fp8()
    parallelize(model, world, "none", compiled)
    materialize(model, world.device, seed=0)
    return model, MuonAdamW(model, OptimConfig())


def step_seconds(
    passes: Passes, optimizer: MuonAdamW, batches: Iterator[list[Batch]], micro: int, steps: int, world: World
) -> list[list[float]]:
    """Seconds of each of `steps` steps, by part: waiting for its batches, forward and backward passes, and
    the optimizer with the gradient norm.

    As in training, the host waits for a GPU once a step, for the norm, and prepares the next step while the
    GPU still updates the weights.
    """
    watch, model = Stopwatch(world.device), passes.model
    for _ in range(steps):
        some = [batch.to(world.device) for _ in range(micro) for batch in next(batches)]
        tokens = world.size * sum(batch.inputs.numel() for batch in some)
        watch.mark()
        for i, batch in enumerate(some):
            set_gradient_sync(model, i, micro)
            passes(batch, tokens)
        watch.mark()
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients).item()
        optimizer.step()
        optimizer.zero_grad()
        watch.mark()
    times = watch.seconds()
    return [times[i : i + len(PHASES)] for i in range(0, len(times), len(PHASES))]


def main(config: TrainingConfig) -> None:
    """`hotlap bench training`."""
    bench_training(config)

"""Memory of a run on each device: estimates before the first step, and the largest micro-batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hotlap.common.errors import is_out_of_memory
from hotlap.common.memory import GB, memory_of, require_memory
from hotlap.model.config import MLP_RATIO, Shape, counts_of, rotary_bytes
from hotlap.model.flops import training_bytes
from hotlap.model.lora import adapter_count
from hotlap.model.transformer import Transformer
from hotlap.train.config import Dtype, Recompute
from hotlap.train.data.rows import Batch, check_rows
from hotlap.train.distributed.sharding import replica_count, shard_count
from hotlap.train.distributed.world import World
from hotlap.train.losses import Loss

USABLE = 0.9  # fraction of the memory to plan with
BATCH_BYTES = 3 * 8  # of a token: input, target and document start
SMALLER = "lower --depth, or --model.layers, --model.width and --model.vocab-size, or use more GPUs"
FEWER = "lower --micro-batch (or set it to auto) or --batch-rows, or add --recompute block"


def device_bytes(world: World) -> int:
    """Memory of the GPU, or this process's share of the machine's memory."""
    return memory_of(world.device) // (1 if world.device.type == "cuda" else processes())


def processes() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank_bytes(model: Transformer, world: World, rows: int) -> dict[str, int]:
    """Estimated memory of a training step on one rank by part, from shapes. rows: of a micro-batch."""
    shards = world.size // replica_count(model)
    return training_bytes(model, rows, model.config.context, shards, model.compute_dtype.itemsize)


def check_memory(
    shape: Shape,
    world: World,
    *,
    step_rows: int,
    micro_rows: int,
    recompute: Recompute,
    dtype: Dtype,
    lora_rank: int = 0,
) -> None:
    """Raise ValueError if a lower bound on the memory of a training step exceeds what a rank has.

    Only shapes are needed: no model, no data. Counted are the float32 weights, with gradients and optimizer
    state of those that are trained; what the backward pass of any kernel needs of each layer; and a step's
    batches.
    """
    counts, T = counts_of(shape), shape.context
    fixed = 12 * counts["matrices"] + 16 * (counts["total"] - counts["matrices"])
    if lora_rank:
        fixed = 4 * counts["total"] + 16 * adapter_count(shape, lora_rank)
    fixed //= shard_count(world)
    row, tables = row_bytes(shape, recompute, dtype), rotary_bytes(shape)
    checks = (
        (f"training {counts['total']:.3g} parameters", fixed, SMALLER),
        (f"training with a context of {T} tokens", fixed + tables + row, "lower --model.context"),
        (f"a micro-batch of {micro_rows} rows of {T} tokens", fixed + tables + micro_rows * row, FEWER),
    )
    for what, needed, hint in checks:
        require_memory(what, needed, hint, world.device, processes())
    batches = step_rows // world.size * T * BATCH_BYTES
    what = f"a step of {step_rows} rows of {T} tokens"
    require_memory(what, batches, "lower --batch-rows", processes=processes())


def row_bytes(shape: Shape, recompute: Recompute, dtype: Dtype) -> int:
    """The least that the backward pass needs of a row: of each layer its input, or without recomputation all
    that the backward pass of its matmuls and of its attention reads.
    """
    kept = shape.width
    if recompute == "none":
        kept = (2 + MLP_RATIO) * shape.width + 2 * shape.kv_heads * shape.head_dim
    return shape.context * shape.layers * kept * {"float32": 4, "fp8": 1}.get(dtype, 2)


def micro_batch_rows(choice: str, batch_rows: int, world: World) -> int:
    """Rows of a micro-batch. "auto" is one row here; largest_micro_batch decides once the model exists."""
    if choice == "all":
        rows = max(1, batch_rows // world.size)
    elif choice == "auto":
        rows = 1
    elif choice.isdecimal() and int(choice) > 0:
        rows = int(choice)
    else:
        raise ValueError(f"micro_batch={choice!r} must be a number of rows, all, or auto")
    check_rows(batch_rows, rows, world.size)
    return rows


def largest_micro_batch(
    model: Transformer,
    batch_rows: int,
    world: World,
    loss: Loss,
    one_row: Callable[[], Batch],
    sequences: int = 1,
) -> int:
    """Rows of the largest micro-batch that divides the step's rows and fits in memory, equal on all ranks.
    sequences: of a row.

    On a GPU, measures micro-batches of one and two rows and extrapolates, so that no trial runs out of
    memory. On a CPU, uses the estimate from shapes.
    """
    per_rank = batch_rows // world.size
    if world.device.type == "cuda" and per_rank > 1:
        batch = one_row()
        one, two = (measure_bytes(model, world, loss, batch.repeated(rows)) for rows in (1, 2))
        fixed, each = 2 * one - two, max(1, two - one)
    else:
        parts = rank_bytes(model, world, sequences)
        each = parts["activations"]
        fixed = sum(parts.values()) - each
    fit = max(1, int((USABLE * device_bytes(world) - fixed) / each))
    fit = min(world.gather(fit))
    return next(rows for rows in range(min(fit, per_rank), 0, -1) if per_rank % rows == 0)


def measure_bytes(model: Transformer, world: World, loss: Loss, batch: Batch) -> int:
    """Peak memory of a forward and backward pass."""
    torch.cuda.reset_peak_memory_stats(world.device)
    loss(model, batch)[0].backward()
    model.zero_grad()
    return torch.cuda.max_memory_allocated(world.device)


@contextmanager
def explain_out_of_memory(world: World, rows: int) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryError that suggests a smaller micro-batch than `rows`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        peak = ""
        if world.device.type == "cuda":
            peak = f" after a peak of {torch.cuda.max_memory_allocated(world.device) / GB:.1f} GB"
        fewer = max((n for n in range(1, rows) if rows % n == 0), default=0)
        hint = (
            f"--micro-batch {fewer} or --micro-batch auto"
            if fewer
            else "--recompute block, or a smaller model"
        )
        raise MemoryError(
            f"rank {world.rank} ran out of the {device_bytes(world) / GB:.1f} GB of {world.device}{peak}, "
            f"with micro-batches of {rows} rows; try {hint}"
        ) from error

"""Memory of a run on each device: estimates before the first step, and the largest micro-batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hotlap.model.flops import training_bytes
from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch, check_rows
from hotlap.train.distributed.sharding import replica_count
from hotlap.train.distributed.world import World
from hotlap.train.losses import Loss

USABLE = 0.9  # fraction of the memory to plan with
GB = 1e9


def device_bytes(world: World) -> int:
    """Memory of the GPU, or this process's share of the machine's memory."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes


def rank_bytes(model: GPT, world: World, rows: int) -> dict[str, int]:
    """Estimated memory of a training step on one rank by part, from shapes. rows: of a micro-batch."""
    shards = world.size // replica_count(model)
    return training_bytes(model, rows, model.config.context, shards, model.compute_dtype.itemsize)


def check_memory(model: GPT, world: World, rows: int) -> dict[str, int]:
    """Return rank_bytes; raise ValueError if the model does not fit even without activations."""
    parts, available = rank_bytes(model, world, rows), device_bytes(world)
    fixed = sum(parts.values()) - parts["activations"]
    if fixed > available:
        raise ValueError(
            f"the model needs {fixed / GB:.1f} GB on each rank even without activations, and {world.device} "
            f"has {available / GB:.1f} GB; train on more GPUs, or a smaller --depth"
        )
    return parts


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
    model: GPT, batch_rows: int, world: World, loss: Loss, one_row: Callable[[], Batch]
) -> int:
    """Rows of the largest micro-batch that divides the step's rows and fits in memory, equal on all ranks.

    On a GPU, measures micro-batches of one and two rows and extrapolates, so that no trial runs out of
    memory. On a CPU, uses the estimate from shapes.
    """
    per_rank = batch_rows // world.size
    if world.device.type == "cuda" and per_rank > 1:
        batch = one_row()
        one, two = (measure_bytes(model, world, loss, batch.repeated(rows)) for rows in (1, 2))
        fixed, each = 2 * one - two, max(1, two - one)
    else:
        parts = rank_bytes(model, world, 1)
        each = parts["activations"]
        fixed = sum(parts.values()) - each
    fit = max(1, int((USABLE * device_bytes(world) - fixed) / each))
    fit = min(world.gather(fit))
    return max(rows for rows in range(1, per_rank + 1) if per_rank % rows == 0 and rows <= fit)


def measure_bytes(model: GPT, world: World, loss: Loss, batch: Batch) -> int:
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
        on_cpu = "not enough memory" in str(error) or "can't allocate memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
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

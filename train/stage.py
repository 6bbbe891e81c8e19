"""What every stage of training does alike."""

from __future__ import annotations

from pathlib import Path

from hotlap.common.log import log
from hotlap.model.flops import causal_flops, nanochat_flops, parameter_counts
from hotlap.model.gpt import GPT
from hotlap.train.distributed.memory import (
    device_bytes,
    rank_bytes,
)
from hotlap.train.distributed.world import World


def describe(model: GPT, out: Path, length: str, world: World, micro_rows: int) -> None:
    """Log what is about to run: parameters, FLOPs, tokens, and the memory of each rank."""
    counts, T = parameter_counts(model), model.config.context
    log.info(
        "%s: %.2fM parameters (%.2fM in products), %.1f MFLOP a token (%.1f causal), %s, %s on %s%s",
        out, counts["total"] / 1e6, (counts["matrices"] + counts["head"]) / 1e6,
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

"""The plan that a speedrun prints before it starts: size, work, memory, disk, download, time and cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hotlap.common.machine import device_name
from hotlap.common.memory import GB
from hotlap.common.terminal import printable
from hotlap.model.flops import meta_model, nanochat_flops, parameter_counts, training_bytes
from hotlap.train.data import public
from hotlap.train.data.hub import DownloadPlan
from hotlap.train.distributed.memory import device_bytes
from hotlap.train.distributed.world import World
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.speedruns.records import dollars_per_hour, throughput


class Later(NamedTuple):
    """A stage after pretraining. tokens: that are passed forward and backward, as far as that is known."""

    name: str
    words: str
    tokens: float


def plan(
    config: PretrainConfig, world: World, download: str, runs: int = 1, later: Sequence[Later] = ()
) -> dict[str, str]:
    """The lines of the plan for `runs` pretraining runs and stages after them, by name. download: the text of
    that line.
    """
    shape, model = config.model, meta_model(config.model)
    counts, flops = parameter_counts(model), nanochat_flops(model)
    lines = {
        "parameters": f"{counts['total'] / 1e6:,.1f}M, {counts['matmul'] / 1e6:,.1f}M in matmuls",
        "model": f"{shape.layers} layers, width {shape.width}, context {shape.context:,}",
    }
    device = device_name(world.device)
    where = f"{world.size} x {device}" if world.size > 1 else device
    expected = throughput(device, world.size, flops)
    if config.loop.minutes:
        lines["length"] = f"{config.loop.minutes:g} minutes of training"
        hours = config.loop.minutes / 60
    else:
        tokens = config.tokens
        lines["length"] = (
            f"{tokens / 1e6:,.1f}M tokens in {config.loop.steps:,} steps, {flops * tokens:.3g} FLOPs"
        )
        every = tokens + sum(stage.tokens for stage in later)
        hours = every / expected.tokens_per_second / 3600 if expected else None
    if runs > 1:
        lines["length"] += f", for each of {runs} runs"
    lines |= {stage.name: stage.words for stage in later}
    lines |= {
        "memory": memory(config, world), "disk": disk(config, runs, len(later)), "download": download,
        "on": where,
    }  # fmt: skip
    if hours is None:
        lines["time"] = "unknown for this device; `hotlap bench speedrun` estimates it"
    else:
        shown = f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
        lines["time"] = f"about {shown}" + (" per run" if runs > 1 else "")
        if expected and not config.loop.minutes:
            lines["time"] += f", assuming {expected.assumes}"
    price = dollars_per_hour(device, world.size)
    if price and hours is not None:
        lines["cost"] = f"about ${price[0] * hours * runs:,.2f}, at ${price[0]:g} an hour ({price[1]})"
    return lines


def memory(config: PretrainConfig, world: World) -> str:
    """Memory of each rank. How many rows fit at once is only known once the model is built."""
    size = 4 if config.dtype == "float32" else 2
    parts = training_bytes(meta_model(config.model), 1, config.model.context, world.size, size)
    row = parts.pop("activations")
    return (
        f"about {sum(parts.values()) / GB:.2f} GB, plus {row / GB:.2f} GB per row of a micro-batch; "
        f"each rank has {device_bytes(world) / GB:.1f} GB"
    )


def disk(config: PretrainConfig, runs: int, later: int = 0) -> str:
    parts = training_bytes(meta_model(config.model), 1, config.model.context)
    size = (runs + later) * 2 * (parts["parameters"] + parts["optimizer"]) / GB
    return f"about {size:.2f} GB for two checkpoints" + (
        " per run" if runs > 1 else " per stage" if later else ""
    )


def confirm(title: str, lines: dict[str, str], yes: bool, world: World) -> bool:
    """Print a plan, and return whether to carry it out. yes: do not ask."""
    if not world.is_main:
        return True
    text = f"{title}\n" + "\n".join(f"  {name:12} {text}" for name, text in lines.items())
    print(printable(text), flush=True)
    if yes:
        return True
    if world.size > 1 or not sys.stdin.isatty():
        raise ValueError(
            "cannot ask for confirmation under torchrun or without a terminal; give --yes to start"
        )
    return input("Continue? [y/N] ").strip().lower() in ("y", "yes")


def download_words(source: str, folder: Path, shards: int, world: World) -> str:
    """The download line of the plan, for this many training shards."""
    if not world.is_main:
        return ""
    return plan_words(public.download_plan(source, folder, shards), folder)


def plan_words(found: DownloadPlan, folder: Path) -> str:
    if not found.missing:
        return f"nothing: {folder} is complete"
    return f"{len(found.missing)} files, {found.bytes_missing / 1e9:.2f} GB, to {folder}"

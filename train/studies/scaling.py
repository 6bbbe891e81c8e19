"""`hotlap scaling`: train several depths, each compute-optimally, fit scaling laws, and predict which depth
to train for a budget of FLOPs, hours or dollars.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from hotlap.common import files
from hotlap.common.log import log
from hotlap.common.machine import device_name
from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.common.terminal import printable
from hotlap.kernels.dispatch import default_device
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.config import MOST_EPOCHS, PretrainConfig
from hotlap.train.distributed.world import World, joined
from hotlap.train.presets import from_depth, matmul_parameters
from hotlap.train.run.folder import read_machines
from hotlap.train.speedruns.records import RECORDS, dollars_per_hour
from hotlap.train.studies.config import ScalingConfig
from hotlap.train.studies.laws import FEWEST_FOR_FLOOR, Law, fit_law
from hotlap.train.studies.series import (
    check_epochs,
    check_series,
    logged_step_seconds,
    shared_data,
    train_once,
)

AXES = {"flops": "training FLOPs", "weights": "matmul parameters", "tokens": "training tokens"}
FAR = 10  # no law is drawn or used beyond this multiple of the largest run
DEEPEST = 100
UNTIMED = 2  # first steps, not timed


@dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    flops: float
    weights: float
    """Matmul parameters."""
    tokens: float
    bpb: float
    tokens_per_second: float | None = None

    @property
    def flops_per_second(self) -> float | None:
        speed = self.tokens_per_second
        return None if speed is None else self.flops / self.tokens * speed


def scaling(config: ScalingConfig) -> str:
    """Train the series, write the results, and return scaling.md's text."""
    price = dollars_per_hour(device_name(default_device()), int(os.environ.get("WORLD_SIZE", 1)))
    runs = check(config, price)
    with joined() as world:
        check_series([*runs.values()], config.out, world, keep=True)
        return train_series(config, runs, world, price)


def train_series(
    config: ScalingConfig,
    runs: dict[int, PretrainConfig],
    world: World,
    price: tuple[float, str] | None,
) -> str:
    with shared_data(next(iter(runs.values())), config.out, world) as folder:
        world.together(lambda: check_vocabulary(config.out, config.vocab_size, "--vocab-size "))
        check_epochs([*runs.values()], folder, MOST_EPOCHS, world)
        points = []
        for depth, run in runs.items():
            if world.is_main:
                log.info("depth %d: %d of %d", depth, len(points) + 1, len(runs))
            points.append(train_point(dataclasses.replace(run, data=str(folder)), world))
        laws = {axis: fit_law([getattr(p, axis) for p in points], [p.bpb for p in points]) for axis in AXES}
        facts = read_machines([run.out for run in runs.values()])
        lines = [f"{facts[0]}, {facts[1]}, {config.data}, {config.ratio:g} tokens per matmul parameter.", ""]
        lines += [*table(points), "", *law_lines(laws, len(points)), ""]
        lines += budget_lines(config, points, laws["flops"], price)
        if world.is_main:
            write(config.out, points, laws, peers(), facts, lines)
    return "\n".join(lines)


def check(config: ScalingConfig, price: tuple[float, str] | None) -> dict[int, PretrainConfig]:
    """The runs of the series by depth. ValueError if the config cannot work."""
    config.validate()
    if config.budget_dollars and not (config.dollars_per_hour or price):
        raise ValueError("the price of this machine is unknown; give --dollars-per-hour")
    if config.budget_flops and deepest(config, config.budget_flops) is None:
        raise ValueError(
            f"budget_flops={config.budget_flops:g} is too little for one step of the smallest model"
        )
    runs = {depth: depth_run(config, depth) for depth in sorted(config.depths)}
    longest = runs[max(runs)]
    if (config.budget_hours or config.budget_dollars) and longest.loop.steps <= UNTIMED:
        raise ValueError(
            f"{longest.out.name} has {longest.loop.steps} steps, too few to measure its speed for a budget "
            "in hours or dollars; add a deeper model to --depths"
        )
    return runs


def check_vocabulary(out: Path, given: int, flag: str) -> None:
    """ValueError if the tokenizer of a series has another size than given: head parameters count towards the
    length of a run. flag: that gives a size.
    """
    size = -(-Tokenizer.load(out / TOKENIZER).vocab_size // 64) * 64
    if size != -(-given // 64) * 64:
        raise ValueError(
            f"vocab_size={given}, but the tokenizer has {size} ids (rounded up to a multiple of 64); give "
            f"{flag}{size} and another --out"
        )


def depth_run(config: ScalingConfig, depth: int) -> PretrainConfig:
    run = from_depth(depth, config.vocab_size, config.context, config.ratio)
    loop = dataclasses.replace(run.loop, evaluate_every=max(1, run.loop.steps))
    return dataclasses.replace(
        run, out=config.out / f"d{depth}", data=config.data, tokenizer=config.tokenizer, seed=config.seed,
        micro_batch=config.micro_batch, loop=loop,
    ).validate()  # fmt: skip


def train_point(run: PretrainConfig, world: World) -> Point:
    last = train_once(run, world, keep=True)
    times = world.gather(logged_step_seconds(run.out, UNTIMED) if world.is_main else [])[0]
    tokens, step = cost(run)[1], run.batch_rows * run.model.context
    return Point(
        run.out.name, cost(run)[0], matmul_parameters(run.model), tokens, last["validation_bpb"],
        step / median(times) if times else None,
    )  # fmt: skip


def cost(run: PretrainConfig) -> tuple[float, float]:
    """FLOPs (nanochat's formula) and tokens of a run."""
    return float(nanochat_flops(meta_model(run.model)) * run.tokens), float(run.tokens)


def table(points: Sequence[Point]) -> list[str]:
    lines = [
        "| run | FLOPs | matmul parameters | tokens | bits per byte | tokens/s |",
        "|---|" + "---:|" * 5,
    ]
    for p in points:
        speed = "n/a" if p.tokens_per_second is None else f"{p.tokens_per_second:,.0f}"
        lines.append(
            f"| {p.name} | {p.flops:.3g} | {p.weights / 1e6:,.2f}M | {p.tokens / 1e6:,.1f}M | {p.bpb:.4f} "
            f"| {speed} |"
        )
    return lines


def law_lines(laws: dict[str, Law], count: int) -> list[str]:
    lines = [f"bits per byte over {AXES[axis]}: {law}" for axis, law in laws.items()]
    if count < FEWEST_FOR_FLOOR:
        lines.append(f"No floor was fitted: that needs {FEWEST_FOR_FLOOR} runs, and there are {count}.")
    return lines


def budget_lines(
    config: ScalingConfig, points: Sequence[Point], law: Law, price: tuple[float, str] | None
) -> list[str]:
    """For each budget: the deepest model it can train, and the predicted bits per byte."""
    largest = max(points, key=lambda p: p.flops)
    rate = largest.flops_per_second
    hourly, source = (config.dollars_per_hour, "as given") if config.dollars_per_hour else price or (0.0, "")
    budgets: list[tuple[str, float]] = []
    if config.budget_flops:
        budgets.append((f"{config.budget_flops:.3g} FLOPs", config.budget_flops))
    if (config.budget_hours or config.budget_dollars) and rate is None:
        raise ValueError(f"{largest.name} is too short to measure its speed; add a deeper model to --depths")
    if config.budget_hours:
        budgets.append((f"{config.budget_hours:g} hours", config.budget_hours * 3600 * rate))
    if config.budget_dollars:
        text = f"${config.budget_dollars:g} at ${hourly:g} an hour ({source})"
        budgets.append((text, config.budget_dollars / hourly * 3600 * rate))
    lines = [budget_line(config, text, flops, law, largest) for text, flops in budgets]
    if lines and rate:
        lines.append(f"Hours assume the {rate / 1e12:.3g} TFLOP/s of {largest.name}.")
    return lines


def budget_line(config: ScalingConfig, text: str, flops: float, law: Law, largest: Point) -> str:
    depth = deepest(config, flops)
    if depth is None:
        return f"{text}: too little for the smallest model"
    needed, tokens = cost(depth_run(config, depth))
    line = f"{text}: depth {depth}, {tokens / 1e6:,.1f}M tokens, {needed:.3g} FLOPs"
    if largest.flops_per_second:
        line += f", {needed / largest.flops_per_second / 3600:.3g} hours"
    if needed <= FAR * largest.flops:
        return line + f", about {law.at(needed):.4f} bits per byte"
    return line + (
        f"; its bits per byte would be a guess, at {needed / largest.flops:.3g} times the FLOPs of "
        f"{largest.name}: the law is used up to {FAR} times"
    )


def deepest(config: ScalingConfig, flops: float) -> int | None:
    """The largest depth whose compute-optimal run fits in `flops`."""
    found = None
    for depth in range(1, DEEPEST + 1):
        try:
            needed = cost(depth_run(config, depth))[0]
        except ValueError:  # too small for even one step
            continue
        if needed > flops:
            break
        found = depth
    return found


def write(
    out: Path,
    points: list[Point],
    laws: dict[str, Law],
    peers: Sequence[Point],
    facts: tuple[str, str],
    lines: list[str],
) -> None:
    """Write scaling.json, scaling.md and scaling.png. facts: device and date."""
    content = {
        "device": facts[0],
        "date": facts[1],
        "points": [dataclasses.asdict(p) for p in points],
        "laws": {axis: dataclasses.asdict(law) for axis, law in laws.items()},
        "peers": [dataclasses.asdict(p) for p in peers],
    }
    files.write_object(out / "scaling.json", content)
    if draw(points, laws, peers, out / "scaling.png", *facts):
        lines = [*lines, "", "![scaling](scaling.png)"]
    files.write(out / "scaling.md", "\n".join(lines) + "\n")


def draw(points: list[Point], laws: dict[str, Law], peers: Sequence[Point], path: Path, *facts: str) -> bool:
    """Bits per byte over FLOPs, parameters and tokens: the series, its laws as far as they are used, and
    other projects' runs. facts: for the caption.
    """
    figure = new_figure(figsize=(12, 4.2))
    if figure is None:
        return False
    for axes, (axis, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        x = [getattr(p, axis) for p in points]
        others = [getattr(p, axis) for p in peers]
        law = laws[axis]
        for low, high, style in ((min(x), max(x), "k-"), (max(x), FAR * max(x), "k:")):
            line = np.geomspace(low, high, 50)
            text = f"exponent {law.exponent:.3f} ± {law.exponent_error:.3f}, dotted beyond the runs"
            axes.plot(line, [law.at(v) for v in line], style, lw=0.8, label=text if low < max(x) else None)
        axes.plot(x, [p.bpb for p in points], "o", label="this series")
        if others:
            axes.plot(
                others, [p.bpb for p in peers], "x", color="C1", label="other projects, on their own text"
            )
        for p in points:
            axes.annotate(p.name, (getattr(p, axis), p.bpb), (4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("validation bits per byte")
    caption(figure, *facts)
    save_figure(figure, path)
    return True


def peers() -> list[Point]:
    """Runs of other projects, to draw beside the series."""
    return [
        Point(f"{t.project} {t.name}", float(t.flops_per_token * t.tokens), t.weights, t.tokens, t.bpb)
        for t in RECORDS
        if t.bpb is not None
    ]


def main(config: ScalingConfig) -> None:
    """`hotlap scaling`."""
    print(printable(scaling(config)))

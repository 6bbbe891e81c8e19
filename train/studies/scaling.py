"""`hotlap scaling`: a series of depths, each trained as long as is best for it, and what it says of larger
ones: power laws of the loss, and the depth to train for a budget of FLOPs, hours or dollars.

A law is bpb = A x^-b, or with enough runs bpb = E + A x^-b, where E is what no size of model would learn.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from hotlap.common import files, options
from hotlap.common.log import log
from hotlap.common.machine import device_name
from hotlap.common.plots import new_figure
from hotlap.kernels.dispatch import default_device
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.distributed.world import World, joined
from hotlap.train.presets import from_depth, matmul_parameters
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.speedruns.records import RECORDS, dollars_per_hour
from hotlap.train.studies.series import logged_step_seconds, shared_data, train_once

AXES = {"flops": "training FLOPs", "weights": "matmul parameters", "tokens": "training tokens"}
FEWEST_FOR_FLOOR = 6  # runs from which an E is fitted: three numbers from fewer would fit noise
FAR = 10  # times the largest run's FLOPs, from which a law is a guess
DEEPEST = 100
UNTIMED = 2


@dataclass(frozen=True)
class ScalingConfig:
    """Train a series of depths, each for its compute-optimal time, and fit how the loss falls.

    Runs that are done are not trained again, so more depths and budgets can be asked for later.
    """

    depths: tuple[int, ...] = (12, 14, 16, 18, 20)
    ratio: float = 12
    """Training tokens for each matmul parameter."""
    vocab_size: int = 32768
    context: int = 2048
    data: str = "pydocs"
    """As of `hotlap pretrain`."""
    tokenizer: str = "bpe"
    """As of `hotlap pretrain`."""
    micro_batch: str = "auto"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    seed: int = 0
    out: Path = Path("runs/scaling")
    """Folder of the runs (d12, ...) and of what they say: scaling.json, scaling.md and scaling.png."""
    budget_flops: float = 0
    """Say which depth to train for so many FLOPs."""
    budget_hours: float = 0
    """Say which depth to train in so many hours of this machine."""
    budget_dollars: float = 0
    """Say which depth to train for so many dollars."""
    dollars_per_hour: float = 0
    """Price of this machine; 0 is a published one, where there is one for its GPUs."""


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


@dataclass(frozen=True)
class Law:
    """bpb = floor + factor * x^-exponent. exponent_error: its standard error where there are more than two
    runs. floors: the least and the largest floor that any one run less would give.
    """

    floor: float
    factor: float
    exponent: float
    exponent_error: float | None
    floors: tuple[float, float] | None
    residual: float
    """Root mean square of what is left, in bits per byte."""

    def at(self, x: float) -> float:
        return self.floor + self.factor * x**-self.exponent

    def __str__(self) -> str:
        sure = (
            "two runs: nothing says how sure"
            if self.exponent_error is None
            else f"± {self.exponent_error:.3f}"
        )
        text = f"exponent {self.exponent:.3f} ({sure}), off by {self.residual:.4f}"
        if self.floors:
            low, high = self.floors
            text += f", floor {self.floor:.3f} ({low:.3f} to {high:.3f} with one run less)"
        return text


def scaling(config: ScalingConfig) -> str:
    """Train the series, write what it says, and return it as text."""
    device = device_name(default_device())
    price = dollars_per_hour(device, int(os.environ.get("WORLD_SIZE", 1)))
    runs = check(config, price)
    with joined() as world, shared_data(next(iter(runs.values())), config.out, world) as folder:
        world.together(lambda: check_vocabulary(config))
        points = []
        for depth, run in runs.items():
            if world.leads:
                log.info("depth %d: %d of %d", depth, len(points) + 1, len(runs))
            points.append(train_point(dataclasses.replace(run, data=str(folder)), world))
        laws = {axis: fit_law([getattr(p, axis) for p in points], [p.bpb for p in points]) for axis in AXES}
        lines = [f"{device}, {config.data}, {config.ratio:g} tokens for each matmul parameter.", ""]
        lines += [*table(points), "", *law_lines(laws, len(points)), ""]
        lines += budget_lines(config, points, laws["flops"], price)
        if world.leads:
            write(config.out, points, laws, peers(), device, lines)
    return "\n".join(lines)


def check(config: ScalingConfig, price: tuple[float, str] | None) -> dict[int, PretrainConfig]:
    """The series' runs by depth, or a ValueError before any time is spent."""
    if len(set(config.depths)) != len(config.depths) or len(config.depths) < 2:
        raise ValueError(f"depths={list(config.depths)} must be two different ones or more")
    budgets = (config.budget_flops, config.budget_hours, config.budget_dollars, config.dollars_per_hour)
    if not all(0 <= budget < float("inf") for budget in budgets):
        raise ValueError("budgets and prices must be 0 (none) or more")
    if config.budget_dollars and not (config.dollars_per_hour or price):
        raise ValueError("no price of this machine is known; give --dollars-per-hour")
    return {depth: depth_run(config, depth) for depth in sorted(config.depths)}


def check_vocabulary(config: ScalingConfig) -> None:
    """The head is counted among the parameters that set how long a run is, so its size has to be so."""
    size = -(-Tokenizer.load(config.out / TOKENIZER).vocab_size // 64) * 64
    if size != -(-config.vocab_size // 64) * 64:
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the tokenizer has {size} ids (in 64s); give "
            f"--vocab-size {size} and another --out"
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
    times = world.gather(logged_step_seconds(run.out, UNTIMED) if world.leads else [])[0]
    tokens, step = cost(run)[1], run.batch_rows * run.model.context
    return Point(
        run.out.name, cost(run)[0], matmul_parameters(run.model), tokens, last["validation_bpb"],
        step / median(times) if times else None,
    )  # fmt: skip


def cost(run: PretrainConfig) -> tuple[float, float]:
    """FLOPs (nanochat's formula) and tokens of a run."""
    tokens = run.loop.steps * run.batch_rows * run.model.context
    return float(nanochat_flops(meta_model(run.model)) * tokens), float(tokens)


def fit_law(x: Sequence[float], bpb: Sequence[float]) -> Law:
    """Least squares of log(bpb - floor) over log x: with the floor that leaves the least, where there are
    runs enough, else with none.
    """
    x, y = np.asarray(x, float), np.asarray(bpb, float)
    if len(x) < FEWEST_FOR_FLOOR:
        return with_floor(x, y, 0.0)
    found = best_floor(x, y)
    others = [best_floor(np.delete(x, i), np.delete(y, i)) for i in range(len(x))]
    return dataclasses.replace(with_floor(x, y, found), floors=(min(others), max(others)))


def best_floor(x: np.ndarray, y: np.ndarray) -> float:
    floors = np.linspace(0, 0.999 * y.min(), 1000)
    return float(min(floors, key=lambda floor: with_floor(x, y, floor).residual))


def with_floor(x: np.ndarray, y: np.ndarray, floor: float) -> Law:
    logs = np.log(x) - np.log(x).mean()
    values = np.log(y - floor)
    slope = float(logs @ values / (logs @ logs))
    factor = float(np.exp(values.mean() - slope * np.log(x).mean()))
    left = values - values.mean() - slope * logs
    error = float((left @ left / (len(x) - 2) / (logs @ logs)) ** 0.5) if len(x) > 2 else None
    residual = float(np.sqrt(np.mean((floor + factor * x**slope - y) ** 2)))
    return Law(float(floor), factor, -slope, error, None, residual)


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
        lines.append(f"No floor: it takes {FEWEST_FOR_FLOOR} runs, and these are {count}.")
    return lines


def budget_lines(
    config: ScalingConfig, points: Sequence[Point], law: Law, price: tuple[float, str] | None
) -> list[str]:
    """For each budget that was given, the deepest model that it pays for, and what it may reach."""
    largest = max(points, key=lambda p: p.flops)
    rate = largest.flops_per_second
    hourly, source = (config.dollars_per_hour, "as given") if config.dollars_per_hour else price or (0.0, "")
    budgets: list[tuple[str, float]] = []
    if config.budget_flops:
        budgets.append((f"{config.budget_flops:.3g} FLOPs", config.budget_flops))
    if (config.budget_hours or config.budget_dollars) and rate is None:
        raise ValueError(f"{largest.name} is too short for its speed to be known; train a deeper one too")
    if config.budget_hours:
        budgets.append((f"{config.budget_hours:g} hours", config.budget_hours * 3600 * rate))
    if config.budget_dollars:
        text = f"${config.budget_dollars:g} at ${hourly:g} an hour ({source})"
        budgets.append((text, config.budget_dollars / hourly * 3600 * rate))
    lines = [budget_line(config, text, flops, law, largest) for text, flops in budgets]
    if lines and rate:
        lines.append(f"Hours assume the {rate / 1e12:.3g} TFLOP/s of {largest.name}, at the same MFU.")
    return lines


def budget_line(config: ScalingConfig, text: str, flops: float, law: Law, largest: Point) -> str:
    depth = deepest(config, flops)
    if depth is None:
        return f"{text}: less than the smallest model needs"
    needed, tokens = cost(depth_run(config, depth))
    line = f"{text}: depth {depth}, {tokens / 1e6:,.1f}M tokens, {needed:.3g} FLOPs"
    if largest.flops_per_second:
        line += f", {needed / largest.flops_per_second / 3600:.3g} hours"
    line += f", about {law.at(needed):.4f} bits per byte"
    if needed > FAR * largest.flops:
        line += f" (a guess: {needed / largest.flops:.0f} times the FLOPs of the largest run)"
    return line


def deepest(config: ScalingConfig, flops: float) -> int | None:
    """The largest depth whose compute-optimal run costs no more."""
    found = None
    for depth in range(1, DEEPEST + 1):
        try:
            needed = cost(depth_run(config, depth))[0]
        except ValueError:  # too small for a step of its own
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
    device: str,
    lines: list[str],
) -> None:
    """scaling.json, scaling.md and scaling.png."""
    content = {
        "device": device,
        "points": [dataclasses.asdict(p) for p in points],
        "laws": {axis: dataclasses.asdict(law) for axis, law in laws.items()},
        "peers": [dataclasses.asdict(p) for p in peers],
    }
    files.write(out / "scaling.json", json.dumps(content, indent=1) + "\n")
    if draw(points, laws, peers, out / "scaling.png"):
        lines = [*lines, "", "![scaling](scaling.png)"]
    files.write(out / "scaling.md", "\n".join(lines) + "\n")


def draw(points: list[Point], laws: dict[str, Law], peers: Sequence[Point], path: Path) -> bool:
    """Bits per byte over FLOPs, parameters and tokens: the series, its laws, and others' runs."""
    figure = new_figure(figsize=(12, 4.2))
    if figure is None:
        return False
    for axes, (axis, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        x = [getattr(p, axis) for p in points]
        others = [getattr(p, axis) for p in peers]
        line = np.geomspace(min(x) / 2, 2 * max(x + others), 200)
        law = laws[axis]
        axes.plot(line, [law.at(v) for v in line], "k--", lw=0.8, label=f"exponent {law.exponent:.3f}")
        axes.plot(x, [p.bpb for p in points], "o", label="this series")
        if others:
            axes.plot(others, [p.bpb for p in peers], "x", color="C1", label="others, on their own text")
        for p in points:
            axes.annotate(p.name, (getattr(p, axis), p.bpb), (4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("validation bits per byte")
    figure.savefig(path, dpi=120)
    return True


def peers() -> list[Point]:
    """Runs of others, to be drawn beside the series."""
    return [
        Point(f"{t.project} {t.name}", float(t.flops_per_token * t.tokens), t.weights, t.tokens, t.bpb)
        for t in RECORDS
        if t.bpb is not None
    ]


def main(arguments: list[str]) -> None:
    """`hotlap scaling`."""
    print(scaling(options.parse(ScalingConfig, arguments, command="scaling")))

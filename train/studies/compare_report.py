"""What `hotlap compare` says and draws: the multipliers of each recipe, in words, tables and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from hotlap.common import files
from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.train.studies.config import FEWEST, CompareConfig
from hotlap.train.studies.laws import Law, fit_law
from hotlap.train.studies.multiplier import Multiplier, NoLaw, Pairs, multiplier


@dataclass(frozen=True)
class Trained:
    """A finished run. seconds: steps times the time of a step, measured by turns."""

    recipe: str
    depth: int
    seed: int
    bpb: float | None
    """None if the run diverged."""
    flops: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A recipe beside A. The multipliers are None where the runs allow none, and `reason` says why."""

    recipe: str
    compute: Multiplier | None
    time: Multiplier | None
    reason: str
    pairs: int
    diverged: int


def comparison(runs: Sequence[Trained], a: str, b: str) -> Comparison:
    """a, b: names of recipes."""
    of = {(run.recipe, run.depth, run.seed): run for run in runs}
    both = [(of[a, r.depth, r.seed], r) for r in runs if r.recipe == b and (a, r.depth, r.seed) in of]
    pairs = [pair for pair in both if None not in (pair[0].bpb, pair[1].bpb)]
    depths, bpb = np.array([one.depth for one, _ in pairs]), np.array([[r.bpb for r in p] for p in pairs])
    compute = time = None
    reason = ""
    try:
        compute = multiplier(Pairs(depths, bpb, np.array([[r.flops for r in p] for p in pairs])))
        seconds = np.array([[r.seconds for r in p] for p in pairs])
        time = multiplier(Pairs(depths, bpb, seconds), measured=True)
    except NoLaw as error:
        reason = str(error)
    return Comparison(b, compute, time, reason, len(pairs), len(both) - len(pairs))


def verdict(found: Comparison, a: str) -> str:
    """The result in one line."""
    if found.compute is None:
        text = f"{found.recipe}: no multiplier, as {found.reason}"
    elif found.compute.found:
        text = f"{found.recipe} needs {found.compute.overall} times the compute of {a}"
    else:
        text = (
            f"{found.recipe}: no difference to {a} found; {found.compute.overall.interval} times its compute"
        )
    if found.time:
        text += f", and {found.time.overall} times its time"
    if found.diverged:
        text += f"; without {found.diverged} of {found.pairs + found.diverged} pairs, where a run diverged"
    return text + "."


def laws_of(runs: Sequence[Trained], recipe: str) -> dict[str, Law | None]:
    """A recipe's bits per byte over FLOPs and over seconds, by the means over seeds; None with too few."""
    done = [run for run in runs if run.recipe == recipe and run.bpb is not None]
    by_depth = [[run for run in done if run.depth == depth] for depth in sorted({r.depth for r in done})]
    scores = [mean(run.bpb for run in some) for some in by_depth]
    enough = len(scores) >= FEWEST
    return {
        axis: fit_law([getattr(some[0], axis) for some in by_depth], scores) if enough else None
        for axis in ("flops", "seconds")
    }


def table(comparisons: Sequence[Comparison], depths: Sequence[int]) -> list[str]:
    """The multiplier of each recipe, overall and at each depth."""
    heads = ["recipe", "compute", "time", *(f"at depth {d}" for d in depths), "per ten times the compute"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for found in comparisons:
        cells = [found.compute and found.compute.overall, found.time and found.time.overall]
        cells += [found.compute.by_depth.get(d) if found.compute else None for d in depths]
        cells.append(found.compute.trend if found.compute else None)
        lines.append(
            f"| {found.recipe} | " + " | ".join("n/a" if c is None else str(c) for c in cells) + " |"
        )
    return lines


def run_table(runs: Sequence[Trained]) -> list[str]:
    """Means over seeds for each depth and recipe."""
    lines = [
        "| depth | recipe | seeds | tokens | FLOPs | seconds | bits per byte |",
        "|---:|---|" + "---:|" * 5,
    ]
    for depth, name in sorted(dict.fromkeys((r.depth, r.recipe) for r in runs), key=lambda place: place[0]):
        some = [r for r in runs if (r.depth, r.recipe) == (depth, name)]
        scores = [r.bpb for r in some if r.bpb is not None]
        score = f"{mean(scores):.4f}" if scores else "diverged"
        one = some[0]
        lines.append(
            f"| {depth} | {name} | {len(some)} | {one.tokens / 1e6:,.2f}M | {one.flops:.3g} "
            f"| {one.seconds:.3g} | {score} |"
        )
    return lines


EXPLAINED = (
    "A multiplier of 0.8 means: for the loss that A reaches, B needs 0.8 times A's compute (FLOPs by "
    "nanochat's formula) or time (the fastest step, timed by turns). In brackets are 95 % intervals. They "
    "hold for these depths; the last column is the factor by which the multiplier changes with size here, "
    "and beyond these depths it is an extrapolation."
)


def write(config: CompareConfig, runs: Sequence[Trained], facts: tuple[str, str]) -> str:
    """Write compare.json, compare.md and compare.png, and return the text. facts: device and date."""
    a, *others = dict.fromkeys(run.recipe for run in runs)
    found = [comparison(runs, a, b) for b in others]
    depths = sorted({run.depth for run in runs})
    laws = {name: laws_of(runs, name) for name in (a, *others)}
    verdicts = [verdict(one, a) for one in found]
    content = {
        "device": facts[0],
        "date": facts[1],
        "preset": config.preset,
        "base": config.base,
        "a": a,
        "comparisons": [
            dataclasses.asdict(one) | {"verdict": text} for one, text in zip(found, verdicts, strict=True)
        ],
        "laws": {
            name: {axis: law and dataclasses.asdict(law) for axis, law in both.items()}
            for name, both in laws.items()
        },
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    files.write_object(config.out / "compare.json", content)
    lines = [*verdicts, "", f"{facts[0]}, {facts[1]}. Preset {config.preset}. {config.base}".strip(), ""]
    lines += [*table(found, depths), "", EXPLAINED, "", *run_table(runs)]
    drawn = draw(runs, found, laws, config, facts)
    text = "\n".join(lines) + "\n"
    files.write(config.out / "compare.md", text + ("\n![compare](compare.png)\n" if drawn else ""))
    return text


def draw(
    runs: Sequence[Trained],
    found: Sequence[Comparison],
    laws: Mapping[str, Mapping[str, Law | None]],
    config: CompareConfig,
    facts: tuple[str, str],
) -> bool:
    """The runs with the law of each recipe, A first, and the multipliers over compute."""
    figure = new_figure(figsize=(11, 4.4))
    if figure is None:
        return False
    left, right = figure.subplots(1, 2)
    a, colors = next(iter(laws)), {name: f"C{i}" for i, name in enumerate(laws)}
    for name, color in colors.items():
        some = [r for r in runs if r.recipe == name and r.bpb is not None]
        x, y = np.array([r.flops for r in some]), np.array([r.bpb for r in some])
        left.plot(x, y, "o", color=color, ms=3, label=name)
        if law := laws[name]["flops"]:
            line = np.geomspace(x.min(), x.max(), 50)
            left.plot(line, [law.at(value) for value in line], color=color, lw=0.8)
    largest = {r.depth: r.flops for r in runs if r.recipe == a}
    for one in found:
        if one.compute is None:
            continue
        points, overall = one.compute.by_depth, one.compute.overall
        x = np.array([largest[d] for d in points])
        middle = np.array([e.value for e in points.values()])
        errors = np.abs(np.array([(e.low, e.high) for e in points.values()]).T - middle)
        color, shift = colors[one.recipe], 1 + 0.04 * list(colors).index(one.recipe)
        right.errorbar(shift * x, middle, errors, fmt="o", ms=4, capsize=3, color=color)
        right.axhspan(overall.low, overall.high, color=color, alpha=0.15)
        right.axhline(overall.value, color=color, lw=0.8)
    right.axhline(1, color="black", lw=0.8)
    left.set(xlabel="training FLOPs", ylabel="validation bits per byte", xscale="log", yscale="log")
    right.set(xlabel=f"training FLOPs of {a}", ylabel=f"multiple of {a}'s compute for its loss", xscale="log")
    right.set_yscale("log")
    for axes in (left, right):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    legend = left.legend(fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
    caption(figure, f"preset {config.preset}", *facts)
    save_figure(figure, config.out / "compare.png")
    return True

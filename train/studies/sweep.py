"""`hotlap sweep`: does a change help? Variants of a recipe beside the recipe as it is, at equal tokens or at
equal time, on several seeds.

All variants of a seed read the same rows, so differences to the base are taken within a seed. Runs take turns
(all variants of seed 0, then of seed 1), so that a series that is cut off is one with fewer seeds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from hotlap.common import files, options
from hotlap.common.errors import known
from hotlap.common.log import log
from hotlap.common.machine import device_name
from hotlap.common.options import merge, tomllib
from hotlap.common.plots import new_figure
from hotlap.kernels.dispatch import default_device
from hotlap.train.distributed.world import World, joined
from hotlap.train.optim.schedule import stage_rows
from hotlap.train.pretrain import PretrainConfig, pretrain
from hotlap.train.studies.series import logged_step_seconds, shared_data, train_once

BASE = "base"
TURNS, PROBED, UNTIMED = 5, 6, 2  # how steps are timed: so often, so many, of which the first do not count
SPREAD = 1.3  # of the median step to the fastest, from which a machine is busy with something else


@dataclass(frozen=True)
class SweepConfig:
    """Train variants of a recipe at equal tokens or at equal time, and say how they differ from it."""

    variants: tuple[str, ...] = ()
    """Each a string of assignments in TOML: "model.smear=false optim.matrix_lr=0.01"."""
    preset: str = "tiny"
    """The recipe to start from."""
    base: str = ""
    """Assignments that hold for the recipe and all variants: 'data="text.txt" loop.steps=100'."""
    seconds: float = 0
    """Give each variant as many steps as fit in so many seconds, as measured first; 0 gives each as many
    tokens as the recipe has.
    """
    seeds: int = 3
    """Runs of each variant."""
    out: Path = Path("runs/sweep")
    """Folder of the runs and of the table: sweep.json, sweep.md and sweep.png."""


@dataclass(frozen=True)
class Variant:
    """A configuration, and what else is changed while it trains."""

    config: PretrainConfig
    changed: Callable[[], AbstractContextManager] = nullcontext


def sweep(config: SweepConfig, device: str) -> list[dict]:
    """Run the sweep that config describes, and return the rows of its table. device: its name."""
    from hotlap.train.presets import PRETRAIN

    start = PRETRAIN[known(config.preset, PRETRAIN, "preset")]()
    base = merge(start, assignments(config.base), "--base")
    variants = {text: Variant(merge(base, assignments(text), text)) for text in config.variants}
    return run_variants({BASE: Variant(base)} | variants, config.seconds, config.seeds, config.out, device)


def assignments(text: str) -> dict:
    """The tables that `a.b=1 c="x y"` means in TOML."""
    lines = re.sub(r"\s+(?=[\w.-]+\s*=)", "\n", text.strip())
    try:
        return tomllib.loads(lines)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{text!r} is not a string of assignments ({error}); write model.smear=false optim.matrix_lr=0.01"
        ) from error


def run_variants(
    variants: Mapping[str, Variant], seconds: float, seeds: int, out: Path, device: str
) -> list[dict]:
    """Train each variant on each seed in a folder of its own under `out`, and return the rows of the table,
    the base's first. What is done is not done again.
    """
    if seeds < 1 or not 0 <= seconds < math.inf:
        raise ValueError(f"seeds={seeds} must be at least 1 and seconds={seconds} 0 (equal tokens) or more")
    base = variants[BASE].config
    for name, variant in variants.items():
        variant.config.validate()
        if shared_by_all(variant.config) != shared_by_all(base):
            raise ValueError(f"{name!r} changes data or tokenizer, which all variants share; use --base")
    if len({folder_name(name) for name in variants}) < len(variants):
        raise ValueError("two variants are the same but for their spaces and signs")
    with joined() as world, shared_data(base, out, world) as folder:
        speeds = seconds_per_step(variants, folder, out, world) if seconds else {}
        found: dict[str, list[dict]] = {name: [] for name in variants}
        for seed in range(seeds):
            for i, (name, variant) in enumerate(variants.items()):
                steps = max(1, int(seconds / speeds[name])) if seconds else equal_tokens(base, variant.config)
                run = variant_run(variant.config, folder, steps, seed, out / f"{folder_name(name)}-{seed}")
                if world.leads:
                    log.info(
                        "run %d of %d: %s, seed %d",
                        seed * len(variants) + i + 1,
                        seeds * len(variants),
                        name,
                        seed,
                    )
                found[name].append(outcome(run, variant, world))
                rows = table_rows(found)
                if world.leads:
                    write(out, rows, device, seconds, base)
    return rows


def shared_by_all(config: PretrainConfig) -> tuple:
    """Bits per byte of other text say nothing about a recipe, and the corpus is made into tokens once."""
    return config.data, config.tokenizer, config.model.vocab_size


def equal_tokens(base: PretrainConfig, config: PretrainConfig) -> int:
    """Steps of config that read as many tokens as the base does in its own."""
    tokens = [c.tokens / c.loop.steps for c in (base, config)]
    return max(1, round(base.loop.steps * tokens[0] / tokens[1]))


def variant_run(config: PretrainConfig, folder: Path, steps: int, seed: int, out: Path) -> PretrainConfig:
    """A variant's run: it validates and saves at its end alone, and is compiled however long it is."""
    compile = (
        {"cuda": "on", "cpu": "off"}[default_device().type] if config.compile == "auto" else config.compile
    )
    loop = dataclasses.replace(config.loop, steps=steps, evaluate_every=steps, save_every=steps)
    return dataclasses.replace(config, out=out, data=str(folder), seed=seed, loop=loop, compile=compile)


def outcome(run: PretrainConfig, variant: Variant, world: World) -> dict:
    """What a run came to. One whose loss is no number any more is one without a result."""
    tokens = run.tokens
    try:
        with variant.changed():
            last = train_once(run, world, keep=False)
    except FloatingPointError as error:
        log.warning("%s: %s", run.out, error)
        return {"bpb": None, "steps": run.loop.steps, "tokens": tokens, "seconds": None, "ms": None}
    times = world.gather(logged_step_seconds(run.out, UNTIMED) if world.leads else [])[0]
    return {
        "bpb": last["validation_bpb"],
        "steps": run.loop.steps,
        "tokens": tokens,
        "seconds": last["seconds"],
        "ms": 1e3 * median(times) if times else None,
    }


def seconds_per_step(
    variants: Mapping[str, Variant], folder: Path, out: Path, world: World
) -> dict[str, float]:
    """Seconds of each variant's fastest step, which others on the machine disturb the least; variants take
    turns, so that what is busy for a while slows all. Of a variant in stages, the mean over the steps of its
    stages. Kept in steps.json: a series that goes on, goes on with them. Variants that are new to it are
    measured beside the base, and count by what they take of its step.
    """
    path = out / "steps.json"
    saved = world.together(lambda: json.loads(path.read_text()) if path.exists() else {})[0]
    new = [name for name in variants if name not in saved]
    if not new:
        return saved
    stages = {name: one_size(variants[name].config) for name in dict.fromkeys((BASE, *new))}
    times: dict[tuple[str, int], list[float]] = {(n, i): [] for n in stages for i in range(len(stages[n]))}
    for turn in range(TURNS):
        for (name, i), found in times.items():
            place = out / f"timing-{turn}-{folder_name(name)}-{i}"
            run = variant_run(stages[name][i], folder, PROBED, 0, place)
            if world.leads:
                shutil.rmtree(run.out, ignore_errors=True)
            with variants[name].changed():
                pretrain(dataclasses.replace(run, validation_tokens=run.model.context))
            found += world.gather(logged_step_seconds(run.out, UNTIMED) if world.leads else [])[0]
            if world.leads:
                shutil.rmtree(run.out)
    now = {name: mean(min(times[name, i]) for i in range(len(stages[name]))) for name in stages}
    spread = max(median(seconds) / min(seconds) for seconds in times.values())
    if world.leads and spread > SPREAD:
        log.warning(
            "warning: a usual step takes %.1f times the fastest: the machine is busy, and the steps given "
            "to each variant may be unfair", spread
        )  # fmt: skip
    share = saved.get(BASE, now[BASE]) / now[BASE]
    speeds = {name: share * seconds for name, seconds in now.items()} | saved
    if world.leads:
        files.write(path, json.dumps(speeds, indent=1) + "\n")
    return speeds


def one_size(config: PretrainConfig) -> list[PretrainConfig]:
    """For each stage of a configuration, one whose steps are all of that stage's rows, with whole windows."""
    schedule = dataclasses.replace(config.schedule, stages=((1.0, 1.0),))
    rows = stage_rows(config.schedule, config.batch_rows)
    return [dataclasses.replace(config, batch_rows=count, schedule=schedule) for count in rows]


def table_rows(found: Mapping[str, list[dict]]) -> list[dict]:
    """A row for each variant that has runs: means over seeds with standard errors, and the difference to the
    base over the seeds that both have.
    """
    base = [run["bpb"] for run in found[BASE]]
    rows = []
    for name, runs in found.items():
        if not runs:
            continue
        scores = [run["bpb"] for run in runs]
        pairs = [(a, b) for a, b in zip(scores, base, strict=False) if a is not None and b is not None]
        whole = None not in scores  # a recipe that fails once has no mean
        bpb, bpb_error, _ = statistics(scores if whole else [])
        apart, apart_error, p = statistics([a - b for a, b in pairs] if whole and name != BASE else [])
        times = [run["ms"] for run in runs if run["ms"]]
        rows.append(
            {
                "variant": name, "seeds": len(runs), "steps": runs[0]["steps"], "tokens": runs[0]["tokens"],
                "bpb": bpb, "bpb_error": bpb_error, "difference": apart, "difference_error": apart_error,
                "p": p, "ms": median(times) if times else None,
                "tokens_per_second":
                    1e3 * runs[0]["tokens"] / runs[0]["steps"] / median(times) if times else None,
                "seconds": mean(run["seconds"] for run in runs) if whole else None,
                "note": "" if whole else f"{scores.count(None)} of {len(runs)} runs diverged",
            }
        )  # fmt: skip
    return rows


def statistics(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, its standard error, and the p-value of Student's t against a mean of 0 (two-sided). None is what
    so few values, or a machine without scipy, cannot tell.
    """
    if len(values) < 2:
        return (values[0] if values else None), None, None
    middle, error = mean(values), stdev(values) / len(values) ** 0.5
    try:
        from scipy.stats import t
    except ImportError:
        return middle, error, None
    return middle, error, float(2 * t.sf(abs(middle / error), len(values) - 1)) if error else None


def folder_name(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", re.sub(r"\s*=\s*", "=", variant))


def write(out: Path, rows: list[dict], device: str, seconds: float, base: PretrainConfig) -> None:
    """sweep.json, sweep.md and sweep.png."""
    equal = f"{seconds:g} s of training" if seconds else "the same number of tokens"
    content = {
        "device": device,
        "equal": equal,
        "base": json.loads(json.dumps(dataclasses.asdict(base), default=str)),
        "rows": rows,
    }
    files.write(out / "sweep.json", json.dumps(content, indent=1) + "\n")
    lines = [f"{device}, each run {equal}.", "", markdown(rows), "", EXPLAINED, ""]
    if draw(rows, out / "sweep.png", equal):
        lines += ["![differences](sweep.png)", ""]
    files.write(out / "sweep.md", "\n".join(lines))


EXPLAINED = (
    "Bits per byte of held-out text, ± standard error over the seeds. Differences to the base are taken "
    "within a seed; negative is better. p: two-sided paired t-test, for each variant alone; of twenty "
    "without an effect one is expected below 0.05."
)


def markdown(rows: list[dict]) -> str:
    """The table for people."""

    def number(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    def with_error(row: dict, name: str, form: str) -> str:
        error = row[f"{name}_error"]
        return number(row[name], form) + ("" if error is None else f" ± {error:.4f}")

    lines = [
        "| variant | seeds | steps | tokens | bits/byte | difference | p | ms/step | tokens/s | time (s) |",
        "|---|" + "---:|" * 9,
    ]
    for row in rows:
        cells = (
            row["variant"] + (f" ({row['note']})" if row["note"] else ""), row["seeds"],
            row["steps"], f"{row['tokens']:,}", with_error(row, "bpb", ".4f"),
            "" if row["variant"] == BASE else with_error(row, "difference", "+.4f"),
            "" if row["variant"] == BASE else number(row["p"], ".2g"), number(row["ms"], ".1f"),
            number(row["tokens_per_second"], ",.0f"), number(row["seconds"], ".1f"),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, equal: str) -> bool:
    """The difference of each variant with its error, the best on top."""
    shown = [row for row in rows if row["difference"] is not None]
    if not shown:
        return False
    figure = new_figure(figsize=(8, 1.4 + 0.3 * len(shown)))
    if figure is None:
        return False
    shown.sort(key=lambda row: row["difference"])
    axes = figure.subplots()
    axes.errorbar(
        [row["difference"] for row in shown], range(len(shown)),
        xerr=[row["difference_error"] or 0 for row in shown], fmt="o", capsize=3,
    )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["variant"] for row in shown], fontsize=8)
    axes.set(ylim=(len(shown) - 0.5, -0.5))
    axes.set_xlabel(f"bits per byte more than the base (± standard error), after {equal}", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def main(arguments: list[str]) -> None:
    """`hotlap sweep`."""
    print(
        markdown(sweep(options.parse(SweepConfig, arguments, command="sweep"), device_name(default_device())))
    )

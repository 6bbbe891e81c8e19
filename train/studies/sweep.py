"""`hotlap sweep`: does a change help? Train variants of a recipe beside the unchanged one (the base), at
equal tokens or equal time, on several seeds.

All variants of a seed read the same rows, so differences to the base are taken within a seed. All variants of
seed 0 run first, then those of seed 1, so an interrupted series is a complete one with fewer seeds.
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
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev

from hotlap.common import files
from hotlap.common.errors import known
from hotlap.common.log import log
from hotlap.common.options import merge, tomllib
from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.common.terminal import printable
from hotlap.kernels.dispatch import default_device
from hotlap.train.distributed.world import World, joined
from hotlap.train.optim.schedule import stage_rows
from hotlap.train.presets import PRETRAIN
from hotlap.train.pretrain import PretrainConfig, pretrain
from hotlap.train.run.folder import read_machines
from hotlap.train.studies.config import SweepConfig
from hotlap.train.studies.series import (
    check_epochs,
    check_series,
    logged_step_seconds,
    shared_data,
    train_once,
)

BASE = "base"
TURNS, PROBED, UNTIMED = 5, 6, 2  # timing: turns per variant, steps per turn, first steps not timed
SPREAD = 1.3  # median step / fastest step; above it, the machine is busy with something else


@dataclass(frozen=True)
class Variant:
    """A configuration, and a context manager that changes other things while it trains."""

    config: PretrainConfig
    changed: Callable[[], AbstractContextManager] = nullcontext


def sweep(config: SweepConfig) -> list[dict]:
    """Run a sweep, and return the rows of its table."""
    config.validate()
    start = PRETRAIN[known(config.preset, PRETRAIN, "preset")]()
    base = merge(start, assignments(config.base), "--base")
    if twice := next((text for text in config.variants if config.variants.count(text) > 1), None):
        raise ValueError(f"--variants has {twice!r} twice; give it once, and --seeds for more runs")
    variants = {text: Variant(merge(base, assignments(text), text)) for text in config.variants}
    return run_variants({BASE: Variant(base)} | variants, config.seconds, config.seeds, config.out)


def assignments(text: str) -> dict:
    """The TOML tables of `a.b=1 c="x y"`."""
    lines = re.sub(r"\s+(?=[\w.-]+\s*=)", "\n", text.strip())
    try:
        return tomllib.loads(lines)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{text!r} is not a string of TOML assignments ({error}); an example: model.smear=false "
            "optim.matrix_lr=0.01"
        ) from error


def run_variants(variants: Mapping[str, Variant], seconds: float, seeds: int, out: Path) -> list[dict]:
    """Train each variant on each seed in its own folder under `out`, and return the rows of the table, the
    base first. Finished runs are not trained again.
    """
    base = variants[BASE].config
    check(variants)
    with joined() as world:
        steps = {name: 1 if seconds else equal_tokens(base, name, v.config) for name, v in variants.items()}

        def runs_of(seed: int, data: str) -> dict[str, PretrainConfig]:
            return {
                name: variant_run(v.config, data, steps[name], seed, out / f"{folder_name(name)}-{seed}")
                for name, v in variants.items()
            }

        check_series([*runs_of(0, base.data).values()], out, world, keep=False)
        if seeds > 1 and world.is_main and find_spec("scipy") is None:
            log.info("no p-values, as scipy is missing: pip install 'hotlap[stats]'")
        with shared_data(base, out, world) as folder:
            if seconds:
                speeds = seconds_per_step(variants, folder, out, world)
                steps = steps_in(seconds, {name: speeds[name] for name in variants})
            check_epochs([*runs_of(0, str(folder)).values()], folder, math.inf, world)
            found: dict[str, list[dict]] = {name: [] for name in variants}
            trained: list[Path] = []
            for seed in range(seeds):
                for i, (name, run) in enumerate(runs_of(seed, str(folder)).items()):
                    if world.is_main:
                        count = len(variants)
                        log.info("run %d of %d: %s, seed %d", seed * count + i + 1, seeds * count, name, seed)
                    found[name].append(outcome(run, variants[name], world))
                    trained.append(run.out)
                    rows = table_rows(found)
                    if world.is_main:
                        write(out, rows, read_machines(trained), seconds, base)
    return rows


def check(variants: Mapping[str, Variant]) -> None:
    """Raise ValueError for what cannot be compared. The first variant is the base."""
    base = next(iter(variants.values())).config
    for name, variant in variants.items():
        variant.config.validate()
        if variant.config.eval_only:
            raise ValueError(f"{name!r} is to train, and eval_only=true trains nothing; leave it out")
        if shared_by_all(variant.config) != shared_by_all(base):
            raise ValueError(f"{name!r} changes data or tokenizer, which all variants share; use --base")
    if len({folder_name(name) for name in variants}) < len(variants):
        raise ValueError("two variants would get the same folder: they differ only in spaces or punctuation")
    if len(variants) < 2:
        raise ValueError("there is nothing to compare with the base; give variants")
    seen: list[tuple[str, Variant]] = []
    for name, variant in variants.items():
        if same := next((other for other, earlier in seen if earlier == variant), None):
            raise ValueError(f"{name!r} trains the same as {same!r}; leave one of them out")
        seen.append((name, variant))


def shared_by_all(config: PretrainConfig) -> tuple:
    """What variants must not change: bits per byte compare only on the same text, tokenized once."""
    return config.data, config.tokenizer, config.model.vocab_size


def equal_tokens(base: PretrainConfig, name: str, config: PretrainConfig) -> int:
    """Steps in which a variant reads as many tokens as the base does in its run."""
    step = config.tokens / config.loop.steps
    if step > base.tokens:
        raise ValueError(
            f"{name!r} reads {step:,.0f} tokens in one step, and the base {base.tokens:,} in its whole run; "
            "give the base more steps"
        )
    return round(base.tokens / step)


def steps_in(seconds: float, speeds: Mapping[str, float]) -> dict[str, int]:
    """Steps of each variant in the same time. speeds: seconds per step."""
    slowest = max(speeds, key=speeds.__getitem__)
    if speeds[slowest] > seconds:
        raise ValueError(
            f"seconds={seconds:g} are less than a step of {slowest!r}, which takes {speeds[slowest]:.3g} s; "
            "give more"
        )
    return {name: int(seconds / speed) for name, speed in speeds.items()}


def variant_run(config: PretrainConfig, data: str, steps: int, seed: int, out: Path) -> PretrainConfig:
    """A variant's run. It validates and saves only at its end; on a GPU, `auto` compiles even a short run."""
    compile = config.compile
    if compile == "auto":
        compile = "on" if default_device().type == "cuda" else "off"
    loop = dataclasses.replace(config.loop, steps=steps, evaluate_every=steps, save_every=steps)
    return dataclasses.replace(config, out=out, data=data, seed=seed, loop=loop, compile=compile)


def outcome(run: PretrainConfig, variant: Variant, world: World) -> dict:
    """The result of a run; bpb is None if the loss diverged to NaN or infinity."""
    tokens = run.tokens
    try:
        with variant.changed():
            last = train_once(run, world, keep=False)
    except FloatingPointError as error:
        log.warning("%s: %s", run.out, error)
        return {"bpb": None, "steps": run.loop.steps, "tokens": tokens, "seconds": None, "ms": None}
    times = world.gather(logged_step_seconds(run.out, UNTIMED) if world.is_main else [])[0]
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
    """Seconds per step of each variant: its fastest step, averaged over the stages of its schedule.

    The fastest step is the one least disturbed by other processes; variants take turns, so that load on the
    machine slows all of them. Kept in steps.json for when the series is resumed. Variants added later are
    timed beside the first, the base, and scaled by the base's saved time.
    """
    base = next(iter(variants))
    path = out / "steps.json"
    saved = world.together(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})[0]
    new = [name for name in variants if name not in saved]
    if not new:
        return saved
    stages = {name: one_size(variants[name].config) for name in dict.fromkeys((base, *new))}
    times: dict[tuple[str, int], list[float]] = {(n, i): [] for n in stages for i in range(len(stages[n]))}
    for turn in range(TURNS):
        for (name, i), found in times.items():
            place = out / f"timing-{len(saved)}-{turn}-{folder_name(name)}-{i}"  # ranks meet by its name
            run = variant_run(stages[name][i], str(folder), PROBED, 0, place)
            if world.is_main:
                shutil.rmtree(run.out, ignore_errors=True)
            with variants[name].changed():
                pretrain(dataclasses.replace(run, validation_tokens=run.model.context))
            found += world.gather(logged_step_seconds(run.out, UNTIMED) if world.is_main else [])[0]
            if world.is_main:
                shutil.rmtree(run.out)
    now = {name: mean(min(times[name, i]) for i in range(len(stages[name]))) for name in stages}
    spread = max(median(seconds) / min(seconds) for seconds in times.values())
    if world.is_main and spread > SPREAD:
        log.warning(
            "warning: the median step takes %.1f times as long as the fastest: the machine is busy, and the "
            "variants may not get the same training time", spread
        )  # fmt: skip
    share = saved.get(base, now[base]) / now[base]
    speeds = {name: share * seconds for name, seconds in now.items()} | saved
    if world.is_main:
        files.write_object(path, speeds)
    return speeds


def one_size(config: PretrainConfig) -> list[PretrainConfig]:
    """For each stage of the schedule, a configuration with that stage's rows throughout, and full windows."""
    schedule = dataclasses.replace(config.schedule, stages=((1.0, 1.0),))
    rows = stage_rows(config.schedule, config.batch_rows)
    return [dataclasses.replace(config, batch_rows=count, schedule=schedule) for count in rows]


def table_rows(found: Mapping[str, list[dict]]) -> list[dict]:
    """A row for each variant that has runs: means over seeds with standard errors, and the difference to the
    base over the seeds that both have run.
    """
    base = [run["bpb"] for run in found[BASE]]
    rows = []
    for name, runs in found.items():
        if not runs:
            continue
        scores = [run["bpb"] for run in runs]
        pairs = [(a, b) for a, b in zip(scores, base, strict=False) if a is not None and b is not None]
        whole = None not in scores  # no mean if any run diverged
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
    """Mean, its standard error, and the p-value of a two-sided t-test against a mean of 0. None for what
    needs more values, or scipy.
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


def write(out: Path, rows: list[dict], facts: tuple[str, str], seconds: float, base: PretrainConfig) -> None:
    """Write sweep.json, sweep.md and sweep.png. facts: device and date."""
    equal = f"{seconds:g} s of training" if seconds else "the same number of tokens"
    content = {
        "device": facts[0],
        "date": facts[1],
        "equal": equal,
        "base": json.loads(json.dumps(dataclasses.asdict(base), default=str)),
        "rows": rows,
    }
    files.write_object(out / "sweep.json", content)
    lines = [f"{facts[0]}, {facts[1]}. Each run: {equal}.", "", markdown(rows), "", EXPLAINED, ""]
    if draw(rows, out / "sweep.png", equal, *facts):
        lines += ["![differences](sweep.png)", ""]
    files.write(out / "sweep.md", "\n".join(lines))


EXPLAINED = (
    "Bits per byte on held-out text, ± standard error over seeds. Differences to the base are taken within "
    "a seed; negative is better. p: two-sided paired t-test, not corrected for multiple comparisons: one in "
    "twenty variants without an effect falls below 0.05."
)


def markdown(rows: list[dict]) -> str:
    """The table in Markdown."""

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


def draw(rows: list[dict], path: Path, equal: str, *facts: str) -> bool:
    """Draw the difference to the base of each variant with its error, best on top. Those far beyond the
    others are arrows with a number, so that the others stay apart. facts: for the caption.
    """
    shown = [row for row in rows if row["difference"] is not None]
    if not shown:
        return False
    figure = new_figure(figsize=(8, 1.6 + 0.3 * len(shown)))
    if figure is None:
        return False
    shown.sort(key=lambda row: row["difference"])
    axes, end = figure.subplots(), axis_end([row["difference"] for row in shown])
    for place, row in enumerate(shown):
        value, error = row["difference"], row["difference_error"] or 0
        if abs(value) <= end:
            axes.errorbar(value, place, xerr=error, fmt="o", color="C0", capsize=3)
        else:
            side = math.copysign(end, value)
            axes.plot(side, place, ">" if value > 0 else "<", color="C3")
            axes.annotate(
                f"{value:+.3f} ± {error:.3f}", (side, place), (-8 if value > 0 else 8, 0), fontsize=8,
                textcoords="offset points", ha="right" if value > 0 else "left", va="center", color="C3",
            )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["variant"] for row in shown], fontsize=8, parse_math=False)
    axes.set(ylim=(len(shown) - 0.5, -0.5))
    axes.set_xlabel(f"difference to the base in bits per byte (± standard error), after {equal}", fontsize=9)
    axes.grid(alpha=0.3)
    caption(figure, *facts)
    save_figure(figure, path)
    return True


def axis_end(differences: list[float]) -> float:
    """The largest difference to draw to scale: all, or those up to three times the upper quartile."""
    sizes = sorted(map(abs, differences))
    usual = 3 * sizes[3 * (len(sizes) - 1) // 4]
    return max(size for size in sizes if size <= usual) if usual else sizes[-1]


def main(config: SweepConfig) -> None:
    """`hotlap sweep`."""
    print(printable(markdown(sweep(config))))

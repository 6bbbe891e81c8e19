"""`hotlap compare A B`: which change helps, at equal quality?

A recipe and changes of it are trained at several depths. The result is how much of A's compute, and of its
time, each B needs for A's loss. All recipes of a seed read the same rows, and all runs of seed 0 come first,
so an interrupted series is a complete one with fewer seeds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from hotlap.common.errors import known
from hotlap.common.log import log
from hotlap.common.options import merge
from hotlap.common.terminal import printable
from hotlap.model.config import GPTConfig
from hotlap.train.config import MOST_EPOCHS, PretrainConfig
from hotlap.train.distributed.world import World, joined
from hotlap.train.presets import PRETRAIN
from hotlap.train.run.folder import read_machines
from hotlap.train.studies import compare_report
from hotlap.train.studies.compare_report import Trained
from hotlap.train.studies.config import CompareConfig
from hotlap.train.studies.ladder import rung, tokens_per_parameter
from hotlap.train.studies.scaling import check_vocabulary, cost
from hotlap.train.studies.series import check_epochs, check_series, finished, shared_data
from hotlap.train.studies.sweep import (
    BASE,
    Variant,
    assignments,
    check,
    folder_name,
    outcome,
    seconds_per_step,
    variant_run,
)

Ladder = dict[int, dict[str, PretrainConfig]]  # depth -> name of a recipe -> its run, without seed and folder


def compare(config: CompareConfig) -> str:
    """Train what is not trained yet, write the results, and return compare.md's text."""
    ladder = plan(config)
    some = next(iter(ladder[min(ladder)].values()))  # what is asked of it is the same for all
    with joined() as world:
        first = [run for *_, run in runs_of(ladder, some.data, 1, config.out)]
        check_series(first, config.out, world, keep=False)
        with shared_data(some, config.out, world) as folder:
            size = some.model.vocab_size
            world.together(lambda: check_vocabulary(config.out, size, "--base model.vocab_size="))
            check_epochs(first, folder, MOST_EPOCHS, world)
            series = runs_of(ladder, str(folder), config.seeds, config.out)
            new = world.together(
                lambda: [finished(run) is None for *_, run in series] if world.is_main else None
            )[0]
            speeds = {depth: speed(ladder[depth], depth, folder, config.out, world) for depth in ladder}
            seconds = [run.loop.steps * speeds[depth][name] for _, depth, name, run in series]
            return train_series(config, series, new, seconds, world)


def runs_of(ladder: Ladder, data: str, seeds: int, out: Path) -> list[tuple[int, int, str, PretrainConfig]]:
    """Seed, depth, recipe and run of a series, in the order in which they are trained."""
    return [
        (seed, depth, name, variant_run(
            recipe, data, recipe.loop.steps, seed, out / f"d{depth}-{folder_name(name)}-{seed}"
        ))
        for seed in range(seeds) for depth, recipes in ladder.items() for name, recipe in recipes.items()
    ]  # fmt: skip


def speed(
    recipes: Mapping[str, PretrainConfig], depth: int, folder: Path, out: Path, world: World
) -> dict[str, float]:
    """Seconds per step of each recipe at a depth, timed by turns."""
    variants = {name: Variant(recipe) for name, recipe in recipes.items()}
    place = out / "timing" / f"d{depth}-{folder_name(next(iter(recipes)))}"
    if world.is_main:
        log.info("depth %d: timing", depth)
    return seconds_per_step(variants, folder, place, world)


def train_series(
    config: CompareConfig,
    series: Sequence[tuple[int, int, str, PretrainConfig]],
    new: Sequence[bool],
    seconds: Sequence[float],
    world: World,
) -> str:
    """series: as of `runs_of`. new: whether a run is still to be trained. seconds: that its steps take."""
    clock, expected, overhead, found = time.monotonic(), 0.0, 0.0, []
    for i, (seed, depth, name, run) in enumerate(series):
        left = sum(s + overhead for s, needed in zip(seconds[i:], new[i:], strict=True) if needed)
        if world.is_main and new[i]:
            log.info(
                "run %d of %d: depth %d, %s, seed %d; about %s left", i + 1, len(series), depth, name, seed,
                duration(left),
            )  # fmt: skip
        bpb = outcome(run, Variant(run), world)["bpb"]
        if new[i]:
            expected += seconds[i]
            overhead = max(0.0, time.monotonic() - clock - expected) / sum(new[: i + 1])  # validation, mostly
        found.append(Trained(name, depth, seed, bpb, *cost(run), seconds[i]))
        if name == series[-1][2]:  # all recipes of this depth and seed
            facts = read_machines([run.out for *_, run in series[: i + 1]])
            text = compare_report.write(config, found, facts) if world.is_main else ""
    return text


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def plan(config: CompareConfig) -> Ladder:
    """What is trained at each depth, A first. ValueError for what cannot be compared."""
    config.validate()
    if not config.b:
        raise ValueError(
            "there is nothing to compare; give A and B, such as hotlap compare '' 'optim.matrix_lr=0.01', "
            "where '' is the preset itself"
        )
    if find_spec("scipy") is None:
        raise ImportError("the interval of a multiplier needs scipy: pip install 'hotlap[stats]'")
    base = merge(preset_of(config.preset), assignments(config.base), "--base")
    texts = [text.strip() for text in (config.a, *config.b)]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice; give each recipe once, and --seeds for more runs")
    recipes = {text or BASE: merge(base, assignments(text), text) for text in texts}
    check({name: Variant(recipe) for name, recipe in recipes.items()})
    for name, recipe in recipes.items():
        check_length(name, recipe, base)
    ratio = config.ratio or tokens_per_parameter(base)
    ladder = {
        depth: {name: rung(r, Fraction(depth, base.model.layers), ratio) for name, r in recipes.items()}
        for depth in sorted(config.depths)
    }
    check_distinct(ladder)
    return ladder


def preset_of(name: str) -> PretrainConfig:
    found = PRETRAIN[known(name, PRETRAIN, "preset")]()
    if not isinstance(found.model, GPTConfig):
        raise ValueError(f"preset={name} is a GPT-2, for which there are no rules of sizes; choose another")
    return found


def check_length(name: str, recipe: PretrainConfig, base: PretrainConfig) -> None:
    """ValueError if a recipe sets what the ladder decides, or is scored on other text."""
    if recipe.loop.minutes or recipe.loop.steps != base.loop.steps:
        raise ValueError(f"{name!r} sets the length of a run, which follows from the size; use --ratio")
    if recipe.base is not None:
        raise ValueError(f"{name!r} starts from {recipe.base}, which has one size; leave out base")
    if recipe.validation_tokens != base.validation_tokens:
        raise ValueError(f"{name!r} validates on other text; set validation_tokens by --base")


def check_distinct(ladder: Ladder) -> None:
    """ValueError if two recipes train the same at all depths, such as those that differ in their seed."""
    series: dict[str, list[PretrainConfig]] = {}
    for name in next(iter(ladder.values())):
        runs = [variant_run(of[name], "", of[name].loop.steps, 0, Path()) for of in ladder.values()]
        if same := next((other for other, earlier in series.items() if earlier == runs), None):
            raise ValueError(f"{name!r} trains the same as {same!r}; leave one of them out")
        series[name] = runs


def main(config: CompareConfig) -> None:
    """`hotlap compare`."""
    print(printable(compare(config)))

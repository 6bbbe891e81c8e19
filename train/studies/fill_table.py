"""`hotlap sweep --fill-table`: what should `hotlap speedrun minutes` train on this device in so many seconds?

A search from what the table suggests, by runs of equal time on several seeds. What it finds becomes a row of
the user's table.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

from hotlap.common import files
from hotlap.common.code import commit
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.train.data.shards import shard_paths, shard_tokens
from hotlap.train.data.sources import shard_folder
from hotlap.train.distributed.world import World, joined
from hotlap.train.presets import REFERENCE_BATCH
from hotlap.train.pretrain import PretrainConfig, check_sizes
from hotlap.train.run.folder import read_machines, run_lock
from hotlap.train.speedruns.minutes import VOCABULARY, timed, trial_flops
from hotlap.train.speedruns.plan import confirm
from hotlap.train.speedruns.shapes import (
    PACKAGED,
    Row,
    TrainingShape,
    add_row,
    best_shape,
    own_rows_and_corpus,
    own_table,
    passes,
    write_table,
)
from hotlap.train.studies import sweep
from hotlap.train.studies.config import SweepConfig
from hotlap.train.studies.search import Scores, search
from hotlap.train.studies.series import SERIES, check_folder, check_series, shared_data

AXIS_WORDS = {
    "depth": "depth", "step_tokens": "batch", "context": "context", "vocab_size": "vocabulary"
}  # fmt: skip
CLIMBMIX = Path(f"data/climbmix-{VOCABULARY}")  # where `hotlap speedrun minutes` has it


def fill_table(config: SweepConfig) -> Row | None:
    """Search, and add a row to the user's table. Returns it, or None if the user declines. All ranks call it.

    A search that was interrupted goes on: its runs are not trained again.
    """
    config.validate()
    folder = data_folder(config.data)
    axes = tuple(AXIS_WORDS)[: 3 if shard_folder(folder) else 4]  # shards have their vocabulary
    with joined() as world, ExitStack() as stack:
        begun = world.together(lambda: begun_before(config) if world.is_main else None)[0]
        own, corpus = world.together(lambda: own_rows_and_corpus(config.data) if world.is_main else None)[0]
        begun = begun or starting_point(config, trial_flops(world, "auto"), own, corpus)
        start = TrainingShape(**begun["shape"])
        if not confirm(f"the best shape for {config.seconds:g} s on {config.data}",
                       plan(config, begun, start, axes), config.yes, world):  # fmt: skip
            return None
        if world.is_main:
            stack.enter_context(run_lock(config.out))
            files.write_object(config.out / SERIES, begun)

        def score(shape: TrainingShape) -> list[float]:
            return trained(shape, start, folder, config, begun, world)

        best, found = search(start, axes, score)
        if not math.isfinite(mean(found[best])):
            raise ValueError(f"no shape could be trained in {config.seconds:g} s; give more --seconds")
        row = world.together(lambda: written(best, found, begun, config) if world.is_main else None)[0]
    return row


def data_folder(data: str) -> str:
    """What runs are given as their data: ClimbMix has to be there already."""
    if data != "climbmix":
        return data
    if not shard_folder(str(CLIMBMIX)):
        raise FileNotFoundError(
            f"no shards in {CLIMBMIX}; `hotlap speedrun minutes` downloads them before its first run"
        )
    return str(CLIMBMIX)


def begun_before(config: SweepConfig) -> dict | None:
    """The starting point of a search that was interrupted; None for a new one. ValueError for another one."""
    check_folder(config.out)
    path, asked = config.out / SERIES, identity(config)
    if not path.exists():
        return None
    saved = files.read_object(path)
    if {name: saved.get(name) for name in asked} != asked:
        was = {name: value for name, value in saved.items() if name in (*asked, "data", "tokenizer")}
        raise ValueError(f"{config.out} was started with {was}, not {asked}; choose another --out")
    return saved


def identity(config: SweepConfig) -> dict:
    return {"fill_table": config.data, "seconds": config.seconds}


def starting_point(config: SweepConfig, flops: float, own: list[Row], corpus: int) -> dict:
    """What identifies a new search, and where it starts. flops: per second."""
    shape, where = best_shape(config.seconds * flops, corpus, own)
    if config.data == "climbmix":
        shape = dataclasses.replace(shape, vocab_size=VOCABULARY)
    return identity(config) | {
        "flops": config.seconds * flops, "corpus_bytes": corpus,
        "shape": dataclasses.asdict(shape), "from": where,
    }  # fmt: skip


def plan(config: SweepConfig, begun: dict, start: TrainingShape, axes: tuple[str, ...]) -> dict[str, str]:
    """The lines of the plan. A search tries the start and its neighbours, and goes on from a better one."""
    fewest = 1 + 2 * len(axes)
    hours = fewest * config.seeds * config.seconds / 3600
    shown = f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
    words = [AXIS_WORDS[axis] for axis in axes]
    return {
        "starts with": f"{start} ({begun['from']})",
        "tries": f"the next smaller and larger {', '.join(words)}, and on where it gets better; "
        f"{config.seeds} runs each",
        "time": f"about {shown} of training for the first {fewest} shapes, and often as long again; "
        "start-up, timing and validation come on top, and what is done is kept if you stop it",
        "writes": f"a row of {own_table()}, from which `hotlap speedrun minutes` chooses",
    }


def trained(
    shape: TrainingShape, start: TrainingShape, data: str, config: SweepConfig, begun: dict, world: World
) -> list[float]:
    """Bits per byte of a shape on each seed; infinite where the machine or the time is too small for it.

    Runs with one vocabulary are a series, whose steps are timed beside the first shape of it.
    """
    out = config.out / f"vocabulary-{shape.vocab_size}"
    first = dataclasses.replace(start, vocab_size=shape.vocab_size)
    recipe, base = (recipe_of(s, data, config, begun) for s in (shape, first))
    name = "-".join(f"{part}{value}" for part, value in dataclasses.asdict(shape).items())
    try:
        check_sizes(recipe, world)
    except ValueError as error:
        log.info("%s: not tried, as %s", shape, error)
        return [math.inf] * config.seeds
    check_series([dataclasses.replace(recipe, out=out / name)], out, world, keep=False)
    with shared_data(recipe, out, world) as shards:
        variants = {sweep.BASE: sweep.Variant(base)}
        if shape != first:
            variants[name] = sweep.Variant(recipe)
        speed = sweep.seconds_per_step(variants, shards, out, world)[name if shape != first else sweep.BASE]
        steps = steps_in(config.seconds, speed, recipe, shards)
        if not steps:
            log.info("%s: not tried, as a step takes %.3g s", shape, speed)
            return [math.inf] * config.seeds
        scores = []
        for seed in range(config.seeds):
            run = sweep.variant_run(recipe, str(shards), steps, seed, out / f"{name}-{seed}")
            bpb = sweep.outcome(run, sweep.Variant(recipe), world)["bpb"]
            scores.append(math.inf if bpb is None else bpb)
        if world.is_main:
            log.info("%s: %s bits per byte", shape, ", ".join(f"{bpb:.4f}" for bpb in scores))
    return scores


def recipe_of(shape: TrainingShape, data: str, config: SweepConfig, begun: dict) -> PretrainConfig:
    """The recipe of `hotlap speedrun minutes`, with a length in steps: a busy machine does not change it."""
    repeats = passes(shape, begun["flops"], begun["corpus_bytes"])
    recipe = timed(config.out, data, config.seconds / 60, shape, repeats)
    return dataclasses.replace(
        recipe, loop=dataclasses.replace(recipe.loop, minutes=0.0),
        validation_tokens=40 * REFERENCE_BATCH if config.data == "climbmix" else 0,
    )  # fmt: skip


def steps_in(seconds: float, speed: float, recipe: PretrainConfig, shards: Path) -> int:
    """Steps in the time, or until `hotlap speedrun minutes` ends after a few passes over a single shard."""
    paths = shard_paths(shards, "train")
    steps = int(seconds / speed)
    if len(paths) > 1:
        return steps
    return min(
        steps,
        math.ceil(recipe.most_epochs * shard_tokens(paths[0]) / (recipe.batch_rows * recipe.model.context)),
    )


def written(best: TrainingShape, found: Scores, begun: dict, config: SweepConfig) -> Row:
    """The row of a search, which is written to the user's table and, with all that was tried, to --out."""
    series = config.out / f"vocabulary-{best.vocab_size}"
    shards = shard_folder(data_folder(config.data)) or series / "data"
    device, date = read_machines(path.parent for path in config.out.glob("*/*/machine.json"))
    row = Row(
        shape=best, flops=begun["flops"], corpus_bytes=begun["corpus_bytes"],
        corpus_tokens=sum(map(shard_tokens, shard_paths(shards, "train"))),
        bpb=mean(found[best]), seeds=config.seeds, seconds=config.seconds, data=config.data,
        device=device, date=date, commit=commit(),
        tried=tuple(
            {"shape": dataclasses.asdict(shape), "bpb": [s if math.isfinite(s) else None for s in scores]}
            for shape, scores in found.items()
        ),
    )  # fmt: skip
    write_table(config.out / PACKAGED.name, [row])
    files.write(config.out / "shapes.md", f"{device}, {date}.\n\n{markdown(best, found)}\n")
    add_row(own_table(), row)
    return row


def markdown(best: TrainingShape, found: Scores) -> str:
    """A table of the shapes, the lowest bits per byte first."""
    lines = ["| depth | tokens a step | context | vocabulary | bits/byte | of each seed |"]
    lines.append("|---:" * 5 + "|---|")
    for shape, scores in sorted(found.items(), key=lambda pair: mean(pair[1])):
        means, each = (
            ("not possible", "")
            if not math.isfinite(mean(scores))
            else (f"{mean(scores):.4f}", ", ".join(f"{score:.4f}" for score in scores))
        )
        bold = "**" if shape == best else ""
        lines.append(
            f"| {shape.depth} | {shape.step_tokens:,} | {shape.context:,} | {shape.vocab_size:,} "
            f"| {bold}{means}{bold} | {each} |"
        )
    return "\n".join(lines)


def main(config: SweepConfig) -> None:
    """`hotlap sweep`, with and without --fill-table."""
    if not config.fill_table:
        sweep.main(config)
    elif row := fill_table(config):
        text = (config.out / "shapes.md").read_text(encoding="utf-8")
        print(printable(f"{text}\n{row.shape}: added to {own_table()}, from {config.out}"))

"""A series of runs: one shared corpus, and finished runs are not trained again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from hotlap.common import files
from hotlap.common.errors import Interrupted
from hotlap.common.log import log
from hotlap.common.memory import amount
from hotlap.common.plots import new_figure
from hotlap.model.config import Shape, counts_of
from hotlap.model.weights import CONFIG, listed
from hotlap.train.data.prepare import prepare
from hotlap.train.data.shards import shard_paths, shard_tokens
from hotlap.train.distributed.world import World
from hotlap.train.pretrain import PretrainConfig, check_sizes, pretrain
from hotlap.train.run.changes import changes
from hotlap.train.run.folder import LOCK, read_config, run_lock
from hotlap.train.run.metrics import METRICS, read_metrics
from hotlap.train.stage import delete_unused

SERIES = "series.json"  # what the runs of a series share
CHECKPOINTS_HELD = 2  # of a run, at a time


def check_series(runs: Sequence[PretrainConfig], out: Path, world: World, keep: bool) -> None:
    """Raise what would keep a run of a series from being trained, before anything is made.

    keep: all checkpoints are kept, not only those of the run in progress.
    """
    check_folder(out)
    for run in runs:
        check_sizes(run, world)
    sizes = [CHECKPOINTS_HELD * checkpoint_bytes(run.model) for run in runs if not run.out.exists()]
    needed = (sum(sizes) if keep else max(sizes)) if sizes else 0
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"the checkpoints in {out} need about {amount(needed)}, and {amount(free)} are free; free up "
            "space, or choose another --out"
        )
    new_figure()  # says now if there will be no pictures


def check_folder(out: Path) -> None:
    """Raise FileExistsError if a folder has something else than a series."""
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if CONFIG in names or METRICS in names:
        raise FileExistsError(f"{out} holds a run or model, not a series; choose another --out")
    if names and LOCK not in names:
        raise FileExistsError(f"{out} holds {names[0]} and no series; choose another --out")


def checkpoint_bytes(shape: Shape) -> int:
    """Weights and optimizer state of a model."""
    counts = counts_of(shape)
    return 8 * counts["matrices"] + 12 * (counts["total"] - counts["matrices"])


@contextmanager
def shared_data(config: PretrainConfig, out: Path, world: World) -> Iterator[Path]:
    """Lock the folder of a series, and yield the folder of token shards for its runs: the one that config
    names, or one made in `out` with config's tokenizer.
    """
    new = not out.exists()
    with ExitStack() as stack:
        with world.main_first(f"make the data of {out}"), ExitStack() as on_error:
            on_error.push(partial(delete_unused, out, new and world.is_main))
            if world.is_main:
                stack.enter_context(run_lock(out))
                check_source(config, out / SERIES)
            _, folder = prepare(out, config.data, config.tokenizer, config.model.vocab_size)
        yield folder


def check_source(config: PretrainConfig, path: Path) -> None:
    """Record the data of a new series. ValueError if a series was made of other data."""
    source = {"data": config.data, "tokenizer": config.tokenizer}
    if not path.exists():
        files.write_object(path, source)
    elif (made := files.read_object(path)) != source:
        raise ValueError(
            f"{path.parent} was started with {made}, not {source}; choose another --out, or restore them"
        )


def check_epochs(runs: Sequence[PretrainConfig], folder: Path, most: float, world: World) -> None:
    """Say how often the longest run reads the shards in a folder if it is more than once. ValueError if more
    than `most` times.
    """
    longest = max(runs, key=lambda run: run.tokens)
    there = sum(shard_tokens(path) for path in shard_paths(folder, "train"))
    epochs = longest.tokens / there
    text = (
        f"the longest run, {longest.out.name}, reads {longest.tokens:,} tokens, and the data has {there:,}: "
        f"{epochs:.1f} epochs"
    )
    if epochs > most:
        raise ValueError(f"{text}, and more than {most:g} teach less and less; add text, or train less")
    if epochs > 1 and world.is_main:
        log.info("%s", text)


def train_once(config: PretrainConfig, world: World, keep: bool) -> dict[str, float]:
    """The last metrics of a run, which is trained or resumed unless it is finished.

    keep: keep its checkpoints. ValueError if the folder has a run with another configuration.
    """
    last = world.together(lambda: finished(config) if world.is_main else None)[0]
    if last is None:
        try:
            last = pretrain(dataclasses.replace(config, resume="auto"))
        except Interrupted:
            raise Interrupted(
                f"stopped and saved in {config.out}; rerun the same command to resume"
            ) from None
    if world.is_main and not keep:
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    return last


def finished(config: PretrainConfig) -> dict[str, float] | None:
    """The last metrics of a finished run; None if it is not finished."""
    if not (config.out / METRICS).exists():
        return None
    if found := changes(read_config(config.out), config):
        raise ValueError(
            f"{config.out} was started with another configuration: {listed(list(found.values()))}; choose "
            "another --out, or restore the original values"
        )
    last = (read_metrics(config.out / METRICS) or [{}])[-1]
    done = last.get("step") == config.loop.steps - 1 and last.get("validation_bpb") is not None
    return last if done else None


def logged_step_seconds(run: Path, skip: int) -> list[float]:
    """Seconds of each step of a run after the first `skip`."""
    ends = [line["seconds"] for line in read_metrics(run / METRICS)]
    return [after - before for before, after in zip(ends[skip - 1 :], ends[skip:], strict=False)]

"""A series of runs: one shared corpus, and finished runs are not trained again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hotlap.common.errors import Interrupted
from hotlap.model.weights import listed
from hotlap.train.data.prepare import prepare
from hotlap.train.distributed.world import World
from hotlap.train.pretrain import PretrainConfig, pretrain
from hotlap.train.run.changes import changes
from hotlap.train.run.folder import read_config, run_lock
from hotlap.train.run.metrics import METRICS, read_metrics


@contextmanager
def shared_data(config: PretrainConfig, out: Path, world: World) -> Iterator[Path]:
    """Lock the folder of a series, and yield the folder of token shards for its runs: the one that config
    names, or one made in `out` with config's tokenizer.
    """
    with ExitStack() as stack:
        with world.main_first(f"make the data of {out}"):
            if world.is_main:
                stack.enter_context(run_lock(out))
            _, folder = prepare(out, config.data, config.tokenizer, config.model.vocab_size)
        yield folder


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

"""A save may be killed at any point: the newest checkpoint is intact, and never a mixture of two."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import (
    TOKENIZER,
    assert_all_whole,
    built,
    digests,
    fill,
    killed,
    load_newest,
    save_steps,
    saved,
)  # fmt: skip

from hotlap.model.weights import run_checkpoints
from hotlap.train.distributed.world import joined
from hotlap.train.run import checkpoint
from hotlap.train.run.checkpoint import Saver
from hotlap.train.run.state import RunState

BEFORE = ["checkpoint-made", "checkpoint-shards", "checkpoint-manifest", "checkpoint-rename"]
AFTER = ["checkpoint-renamed", "checkpoint-retention"]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Hashes of each step's checkpoint, which do not depend on the number of ranks."""
    return saved(tmp_path_factory.mktemp("held"), 1, 2, 3)


@pytest.mark.parametrize(
    ("point", "size", "rank"),
    [(point, 1, 0) for point in BEFORE + AFTER] + [("checkpoint-made", 2, 1), ("checkpoint-shards", 2, 0)],
)
def test_after_a_kill_at_any_point_the_newest_checkpoint_is_what_was_saved(tmp_path, held, point, size, rank):
    killed(tmp_path, 1, 2, 3, size=size, fault=f"{point}:{rank}:3:sigkill")
    with joined() as world:
        assert_all_whole(world, tmp_path)
        step = 3 if point in AFTER else 2
        assert load_newest(world, tmp_path) == (step, held[step])
        assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
        save_steps(world, tmp_path, (3, 4))  # the next process saves these steps too
        assert [p.name for p in run_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
        assert_all_whole(world, tmp_path)


@pytest.mark.parametrize("point", ["", "checkpoint-shards:0:3:sigkill", "checkpoint-rename:0:3:sigkill"])
@pytest.mark.parametrize("manifest", ["whole", "missing"])
def test_a_save_over_an_existing_step_leaves_it_or_replaces_it_whole(tmp_path, held, point, manifest):
    saved(tmp_path, 2, 3)
    folder = tmp_path / "checkpoints" / "step-000003"
    if manifest == "missing":
        (folder / "manifest.json").unlink()
    if point and manifest == "missing":
        killed(tmp_path, 3, seed=40, fault=point)
        expected = (2, held[2])
    else:
        other = saved(tmp_path, 3, seed=40, fault=point)[3]
        expected = (3, other if manifest == "missing" else held[3])
    with joined() as world:
        assert_all_whole(world, tmp_path)
        assert load_newest(world, tmp_path) == expected


class PowerCut(BaseException):
    """Stands for kill -9: nothing runs after it, not even cleaning up."""


def cut_power_at(point: int, monkeypatch) -> list[str]:
    """Fail all file operations of a save from the point-th on. Returns the list of operations so far."""
    done: list[str] = []

    def wrap(owner, name: str) -> None:
        real = getattr(owner, name)

        def operation(*arguments, **options):
            if len(done) >= point:
                if name == "rmtree" and len(done) > point:
                    return None  # called by the clean-up, which a killed process never reaches
                if name == "rmtree":
                    os.unlink(arguments[0] / "config.json")  # as if killed half-way
                done.append(name)
                raise PowerCut
            done.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, operation)

    for name in ("sync", "file_sha256", "require_space"):
        wrap(checkpoint, name)
    for name in ("mkdir", "write_text", "rename", "open"):
        wrap(Path, name)  # torch opens shards with Path.open
    wrap(shutil, "rmtree")
    return done


def test_a_power_cut_at_any_operation_leaves_an_intact_newest_checkpoint(tmp_path):
    point, survived = 0, False
    model, states = built()
    with joined() as world:
        before = tmp_path / "before"
        held = save_steps(world, before, (3, 6))
        fill(model, states, 9)
        held[9] = digests(model, states)
        while not survived:
            run = tmp_path / f"cut-at-{point}"
            shutil.copytree(before, run)
            with pytest.MonkeyPatch.context() as patch:
                done = cut_power_at(point, patch)
                try:
                    with Saver(run, world) as saver:
                        saver.save(model, states, TOKENIZER, RunState(step=9))
                    survived = True
                except PowerCut:
                    pass
            assert_all_whole(world, run)
            step, found = load_newest(world, run)
            assert step in (6, 9) and found == held[step], done
            shutil.rmtree(run)
            point += 1
    assert point > 20  # operations that were interrupted


def test_retention_keeps_the_newest_two_and_ignores_other_folders(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (
        "step-000009",
        ".tmp-step-000008-0123abcd",
        "aside-step-000007-0123abcd",
        "step-1",
        "step-x",
    ):
        (folder / name / "optimizer").mkdir(parents=True)
    with joined() as world:
        for step in (1, 2, 3, 4):
            save_steps(world, tmp_path, (step,))
            assert [p.name for p in run_checkpoints(tmp_path)] == [
                f"step-{i:06d}" for i in range(max(1, step - 1), step + 1)
            ]
        held = save_steps(world, tmp_path, (9,))
        assert [p.name for p in run_checkpoints(tmp_path)] == ["step-000004", "step-000009"]
        assert load_newest(world, tmp_path) == (9, held[9])

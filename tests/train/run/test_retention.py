"""The best checkpoint: named, kept beside the newest ones, and known to a run that goes on."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from helpers.checkpoints import save_validated
from helpers.ranks import Failed, in_world, run_ranks
from helpers.small_runs import small_run

from hotlap.common.errors import DataError
from hotlap.model.weights import model_folder, run_checkpoints
from hotlap.train.loop import LoopConfig
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import read_metrics
from hotlap.train.run.retention import best_score, name_best, score


def names(run: Path) -> list[str]:
    return [folder.name for folder in run_checkpoints(run)]


def named(run: Path) -> str:
    return model_folder(run / "checkpoints" / "best").name


def validate_with(monkeypatch, losses: list[float]) -> None:
    """Let validations have these losses, in turns."""
    values = iter(losses)
    monkeypatch.setattr(
        "hotlap.train.pretrain.validation",
        lambda *_: {"validation_loss": next(values), "validation_bpb": 0.0},
    )


def test_the_best_checkpoint_is_saved_at_its_validation_and_kept(tmp_path, monkeypatch):
    validate_with(monkeypatch, [3.0, 1.0, 2.0, math.nan, 4.0, 5.0])
    config = small_run(tmp_path, loop=LoopConfig(12, evaluate_every=2, save_every=5))
    pretrain(config)
    assert named(config.out) == "step-000004"
    assert names(config.out) == ["step-000004", "step-000010", "step-000012"]
    assert json.loads((config.out / "best.json").read_text()) == {"step": 4, "validation_loss": 1.0}
    assert model_folder(config.out).name == "step-000012"  # what a run is loaded as stays the newest


def test_a_resumed_run_knows_its_best_and_what_replaces_it(tmp_path, monkeypatch):
    config = small_run(tmp_path, loop=LoopConfig(4, evaluate_every=2, save_every=2))
    validate_with(monkeypatch, [1.0, 3.0])
    pretrain(config)
    assert named(config.out) == "step-000002"
    validate_with(monkeypatch, [2.0, 4.0, 1.5, 0.5])
    for steps, best in ((8, "step-000002"), (12, "step-000012")):
        longer = dataclasses.replace(config.loop, steps=steps)
        pretrain(dataclasses.replace(config, loop=longer, resume="auto"))
        assert named(config.out) == best
    assert names(config.out) == ["step-000002", "step-000010", "step-000012"]  # 2 goes with the next save


def test_a_run_resumed_from_before_its_best_checkpoint_has_the_best_of_what_is_left(tmp_path, monkeypatch):
    config = small_run(tmp_path, loop=LoopConfig(8, evaluate_every=2, save_every=2))
    validate_with(monkeypatch, [4.0, 3.0, 2.0, 1.0])
    pretrain(config)
    assert named(config.out) == "step-000008"
    validate_with(monkeypatch, [9.0])
    pretrain(dataclasses.replace(config, resume=str(config.out / "checkpoints" / "step-000006")))
    assert named(config.out) == "step-000006"  # 8, which was better, has been renamed and taken again


def test_a_run_killed_in_its_last_validation_names_its_best_when_it_is_resumed(tmp_path, monkeypatch):
    config = small_run(tmp_path, loop=LoopConfig(4, evaluate_every=4, save_every=4))
    validate_with(monkeypatch, [])
    with pytest.raises((StopIteration, RuntimeError)):
        pretrain(config)
    validate_with(monkeypatch, [1.0])
    pretrain(dataclasses.replace(config, resume="auto"))
    assert named(config.out) == "step-000004"
    assert read_metrics(config.out / "metrics.jsonl")[-1]["validation_loss"] == 1.0


def test_rank_0_decides_for_all_ranks(tmp_path):
    found = run_ranks(2, in_world, save_validated, tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5})
    assert found == [[True, True, False, False]] * 2
    assert named(tmp_path) == "step-000002" and names(tmp_path) == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]


@pytest.mark.parametrize(("point", "best"), [("rename", 1), ("renamed", 1), ("retention", 4)])
def test_a_kill_while_a_better_one_is_saved_leaves_a_best_checkpoint_that_is_there(tmp_path, point, best):
    losses = {1: 3.0, 2: 4.0, 3: 5.0, 4: 1.0}
    with pytest.raises(Failed):
        run_ranks(
            1, in_world, save_validated, tmp_path, losses, env={"FAULT": f"checkpoint-{point}:0:4:sigkill"}
        )
    assert named(tmp_path) == f"step-00000{best}" and best_score(tmp_path) == -losses[best]


def test_of_rewards_the_highest_is_the_best_and_of_losses_the_lowest():
    assert score({"validation_reward": 0.5}) > score({"validation_reward": 0.25})
    assert score({"validation_loss": 1.0, "validation_accuracy": 0.1}) > score({"validation_loss": 2.0})
    assert score({}) is score({"validation_loss": math.nan}) is score({"validation_pass_at_1": 1.0}) is None


def test_a_run_whose_best_checkpoint_is_unknown_says_so(tmp_path, caplog):
    config = small_run(tmp_path, loop=LoopConfig(2))
    pretrain(config)
    (config.out / "best.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/best\.json names none of the checkpoints"):
        named(config.out)
    (config.out / "best.json").write_text("{")
    with pytest.raises(DataError, match=r"best\.json is not JSON"):
        named(config.out)
    assert best_score(config.out) is None and "the next validation is the best" in caplog.text
    name_best(config.out, 99, {"validation_loss": 1.0})  # is not there
    assert best_score(config.out) is None

"""A save that fails in the background stops training with its error and leaves earlier checkpoints intact."""

import pytest
import torch
from helpers.checkpoints import TOKENIZER, assert_all_whole, built, fill, load_newest, save_steps, saved
from helpers.commands import INPUT_OUTPUT, USAGE, assert_error, pretrain_here
from helpers.ranks import Failed
from helpers.small_runs import small_run

from hotlap.model.weights import run_checkpoints
from hotlap.train import pretrain
from hotlap.train.distributed.world import joined
from hotlap.train.run.checkpoint import Saver
from hotlap.train.run.metrics import read_metrics
from hotlap.train.run.state import RunState


@pytest.mark.parametrize("point", ["made", "shards", "manifest", "rename"])
def test_a_failed_save_stops_training_at_the_next_save(tmp_path, monkeypatch, point):
    monkeypatch.setenv("FAULT", f"checkpoint-{point}:0:6:raise")
    config = small_run(tmp_path)  # saves every 3 of 12 steps
    with pytest.raises(ValueError, match=f"injected at checkpoint-{point}, step 6"):
        pretrain.pretrain(config)
    assert 6 <= len(read_metrics(config.out / "metrics.jsonl")) <= 9
    assert [p.name for p in (config.out / "checkpoints").iterdir()] == ["step-000003"]


def test_a_run_waits_for_its_last_save(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "checkpoint-manifest:0:12:sleep=0.3")
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    assert run_checkpoints(config.out)[-1].name == "step-000012"
    monkeypatch.setenv("FAULT", "checkpoint-manifest:0:12:raise")
    with pytest.raises(ValueError, match="injected"):
        pretrain.pretrain(small_run(tmp_path, out=tmp_path / "other"))


@pytest.mark.parametrize(
    ("action", "expected", "said"),
    [("raise", USAGE, "injected"), ("enospc", INPUT_OUTPUT, "the disk is full")],
)
def test_the_command_reports_a_failed_save_in_one_line(work, capsys, monkeypatch, action, expected, said):
    monkeypatch.setenv("FAULT", f"checkpoint-shards:0:2:{action}")
    assert_error(capsys, pretrain_here("--loop.save-every", "2"), expected, said)


def test_a_checkpoint_being_written_survives_an_error_in_training(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "checkpoint-manifest:0:3:sleep=0.3")
    with joined() as world:
        with pytest.raises(ZeroDivisionError), Saver(tmp_path, world) as saver:
            saver.save(*built(), TOKENIZER, RunState(step=3))
            raise ZeroDivisionError
        assert_all_whole(world, tmp_path)
        assert load_newest(world, tmp_path)[0] == 3


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_excludes_changes_made_while_it_is_written(tmp_path, size):
    held = saved(tmp_path, 3, size=size, fault="checkpoint-made:0:3:sleep=0.3")
    with joined() as world:
        assert load_newest(world, tmp_path) == (3, held[3])


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_rank_cannot_write_all_stop_and_report_its_error(tmp_path, rank):
    with pytest.raises(Failed) as failure:
        saved(tmp_path, 3, 6, 9, size=2, fault=f"checkpoint-shards:{rank}:6:enospc")
    lines = {r: text.rstrip().splitlines()[-1] for r, text in failure.value.texts.items()}
    assert lines[rank].startswith("OSError: the disk is full: ") and failure.value.seconds < 20
    assert (
        lines[1 - rank] == f"hotlap.common.errors.RankLost: rank {rank}: [Errno 28] No space left on device"
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_nan_and_infinity_are_not_saved(tmp_path, kind, value):
    with joined() as world:
        held = save_steps(world, tmp_path, (3,))
        model, states = built()
        fill(model, states, 6)
        tensors = model.state_dict() if kind == "weights" else states.tensors
        name = "head.weight" if kind == "weights" else "head.weight/exp_avg"
        with torch.no_grad():
            tensors[name][-1, -1] = value
        saver = Saver(tmp_path, world)
        saver.save(model, states, TOKENIZER, RunState(step=6))
        with pytest.raises(FloatingPointError, match=f"{name} is not finite after step 6"):
            saver.save(model, states, TOKENIZER, RunState(step=9))
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
        assert load_newest(world, tmp_path) == (3, held[3])

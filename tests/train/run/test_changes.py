"""Runs are extended, and go on from other runs' checkpoints; what does not carry over is refused or said."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.run_functions import fine_tuning, losses, metrics, state_of
from helpers.small_runs import small_run, write_text

from hotlap.common.log import log
from hotlap.model.weights import open_model, run_checkpoints
from hotlap.train import pretrain as module
from hotlap.train.data.rows import PackedRows
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.pretrain import PretrainConfig, pretrain
from hotlap.train.run.changes import continued
from hotlap.train.run.folder import read_machine, write_config
from hotlap.train.run.state import RunState
from hotlap.train.speedruns.minutes import as_begun
from hotlap.train.speedruns.minutes import timed as timed_recipe
from hotlap.train.speedruns.shapes import TrainingShape


@pytest.fixture(autouse=True)
def everything_is_logged():
    before = log.level
    log.setLevel("INFO")
    yield
    log.setLevel(before)


def run_of(folder: Path, steps: int, **fields) -> PretrainConfig:
    loop = LoopConfig(steps, **{"evaluate_every": 100, "save_every": 100} | fields.pop("loop", {}))
    return small_run(folder, **{"out": folder / "old", "loop": loop} | fields)


def steps_in(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run)]


def names(run: Path) -> list[str]:
    return [folder.name for folder in run_checkpoints(run)]


def stop_at_pass(monkeypatch, number: int) -> None:
    """Make training stop in its n-th forward pass, as if it had been killed."""
    passes, real = iter(range(number)), module.next_token_loss

    def loss(model, batch):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(module, "next_token_loss", loss)


def test_a_finished_run_is_extended_in_place_as_often_as_one_likes(tmp_path, caplog):
    pretrain(run_of(tmp_path, 2))
    for steps in (4, 5):
        pretrain(run_of(tmp_path, steps, resume="auto"))
        assert steps_in(tmp_path / "old") == list(range(steps))
        assert json.loads((tmp_path / "old" / "config.json").read_text())["loop"]["steps"] == steps
        assert f"| steps | {steps} |" in (tmp_path / "old" / "report.md").read_text()
        assert caplog.text.count("schedule follows the new length") == 1
        caplog.clear()
    assert names(tmp_path / "old") == ["step-000004", "step-000005"]


def test_a_run_extended_in_a_new_folder_is_the_one_extended_in_place(tmp_path):
    pretrain(run_of(tmp_path, 2))
    pretrain(run_of(tmp_path, 4, out=tmp_path / "new", resume=str(tmp_path / "old")))
    assert names(tmp_path / "old") == ["step-000002"]
    assert names(tmp_path / "new") == ["step-000002", "step-000004"]
    pretrain(run_of(tmp_path, 4, resume="auto"))
    assert losses(tmp_path / "new") == losses(tmp_path / "old")[1:]
    assert state_of(tmp_path / "new") == state_of(tmp_path / "old")


def test_an_extension_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    pretrain(run_of(tmp_path, 2))
    pretrain(run_of(tmp_path, 6, out=tmp_path / "whole", resume=str(tmp_path / "old")))
    for out, choice in ((tmp_path / "new", str(tmp_path / "old")), (tmp_path / "old", "auto")):
        killed = run_of(tmp_path, 6, out=out, resume=choice, loop={"save_every": 4})
        with monkeypatch.context() as patch:
            stop_at_pass(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                pretrain(killed)
        assert names(out) == ["step-000002", "step-000004"]
        pretrain(dataclasses.replace(killed, resume="auto"))
        assert losses(out)[-5:] == losses(tmp_path / "whole")
        assert state_of(out) == state_of(tmp_path / "whole")


def test_a_new_folder_without_a_checkpoint_of_its_own_goes_on_from_the_one_it_was_started_from(
    tmp_path, monkeypatch
):
    pretrain(run_of(tmp_path, 2))
    new = run_of(tmp_path, 4, out=tmp_path / "new", resume=str(tmp_path / "old"))
    with monkeypatch.context() as patch:
        patch.setattr("hotlap.train.stage.fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(new)
    assert not names(new.out)
    pretrain(run_of(tmp_path, 5, out=new.out, resume="auto"))
    assert steps_in(new.out) == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["old", "new"])
def test_fewer_steps_than_there_are_is_refused_and_changes_nothing(tmp_path, place):
    pretrain(run_of(tmp_path, 3))
    before = (tmp_path / "old" / "config.json").read_text()
    config = run_of(tmp_path, 2, out=tmp_path / place, resume=str(tmp_path / "old"))
    with pytest.raises(
        ValueError, match=r"has taken 3 steps .* ends after 2 steps; give a higher --loop\.steps"
    ):
        pretrain(config)
    assert (tmp_path / "old" / "config.json").read_text() == before and names(tmp_path / "old")
    longer = LoopConfig(4, evaluate_every=100, save_every=100)
    pretrain(dataclasses.replace(config, loop=longer))  # the correction is taken
    assert steps_in(tmp_path / place)[-1] == 3


@pytest.mark.parametrize(("place", "choice"), [("old", "auto"), ("new", "old")])
def test_a_finished_run_of_the_same_length_leaves_a_model(tmp_path, place, choice, caplog, monkeypatch):
    pretrain(run_of(tmp_path, 2))
    machine = read_machine(tmp_path / "old")
    monkeypatch.setattr("hotlap.common.machine.now", lambda: "2099-01-01")
    choice = choice if choice == "auto" else str(tmp_path / choice)
    last = pretrain(run_of(tmp_path, 2, out=tmp_path / place, resume=choice))
    assert "finished after step 2; to train on, give a higher --loop.steps" in caplog.text
    assert last["step"] == 1 and open_model(tmp_path / place)[0].name == "step-000002"
    assert steps_in(tmp_path / place)[-1] == 1
    assert read_machine(tmp_path / "old") == machine, "the steps were taken then"


@pytest.mark.parametrize("steps", [3, 6])
def test_a_run_stopped_before_its_end_gets_another_length_with_a_log_line(
    tmp_path, steps, monkeypatch, caplog
):
    config = run_of(tmp_path, 4, loop={"save_every": 2})
    with monkeypatch.context() as patch:
        stop_at_pass(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    loop = dataclasses.replace(config.loop, steps=steps)
    pretrain(dataclasses.replace(config, loop=loop, resume="auto"))
    assert steps_in(config.out) == list(range(steps))
    assert f"going on with loop.steps: saved 4, current {steps}" in caplog.text


def rows_taken(monkeypatch) -> list[int]:
    """The rows of the training data in the order in which they are taken."""
    taken, real = [], PackedRows.batch

    def batch(self, first, count):
        if self.shuffle:
            taken.extend(range(first, first + count))
        return real(self, first, count)

    monkeypatch.setattr(PackedRows, "batch", batch)
    monkeypatch.setattr("hotlap.train.stage.prefetched", lambda steps, device: steps)
    return taken


def test_the_data_goes_on_at_the_next_row_whatever_the_stages_and_the_batch(tmp_path, monkeypatch):
    growing = ScheduleConfig(stages=((0.25, 1.0), (1.0, 1.0)))
    taken = rows_taken(monkeypatch)
    pretrain(run_of(tmp_path, 4, schedule=growing))
    assert taken[1:] == list(range(1 + 1 + 4 + 4))  # the first one is a check
    for fields, more in (({"schedule": growing}, 4 * 4), ({"batch_rows": 3}, 4 * 3)):
        taken.clear()
        config = run_of(tmp_path, 8, out=tmp_path / str(more), resume=str(tmp_path / "old"), **fields)
        pretrain(config)
        assert taken[1:] == list(range(10, 10 + more))


def test_another_run_s_checkpoint_is_taken_with_other_rates_which_are_listed(tmp_path, caplog):
    config = run_of(tmp_path, 2)
    pretrain(config)
    optim = dataclasses.replace(config.optim, matrix_lr=0.01)
    schedule = dataclasses.replace(config.schedule, warmup_steps=3)
    fields = {"optim": optim, "schedule": schedule, "batch_rows": 2, "resume": str(config.out)}
    pretrain(run_of(tmp_path, 4, out=tmp_path / "new", **fields))
    assert (
        "going on with batch_rows: saved 4, current 2; loop.steps: saved 2, current 4; "
        "optim.matrix_lr: saved 0.02, current 0.01; schedule.warmup_steps: saved 40, current 3" in caplog.text
    )
    with pytest.raises(ValueError, match="was started with another configuration: batch_rows"):
        pretrain(run_of(tmp_path, 4, **fields))


def test_another_seed_or_other_data_is_refused(tmp_path):
    pretrain(run_of(tmp_path, 2))
    other = {"out": tmp_path / "new", "resume": str(tmp_path / "old")}
    with pytest.raises(ValueError, match="another order of the data: seed: saved 0, current 3"):
        pretrain(run_of(tmp_path, 4, seed=3, **other))
    text = write_text(tmp_path / "longer.txt", 150)
    with pytest.raises(ValueError, match=r"started on other data than .*new/data holds now"):
        pretrain(dataclasses.replace(run_of(tmp_path, 4, **other), data=str(text)))
    assert not names(tmp_path / "new")


def test_fine_tuning_and_pretraining_do_not_resume_each_other_and_epochs_extend(tmp_path, caplog):
    pretrain(run_of(tmp_path, 2))
    fine_tuning(str(tmp_path), "tuned", "old", steps=2)
    with pytest.raises(ValueError, match=r"is a checkpoint of pretrain, which sft cannot resume; .*--base"):
        fine_tuning(str(tmp_path), "other", "old", resume=str(tmp_path / "old"))
    with pytest.raises(ValueError, match="is a checkpoint of sft, which pretrain cannot resume"):
        pretrain(run_of(tmp_path, 4, out=tmp_path / "new", resume=str(tmp_path / "tuned")))
    fine_tuning(str(tmp_path), "tuned", "old", steps=2, epochs=1.0, resume="auto")
    assert steps_in(tmp_path / "tuned") == list(range(len(metrics(tmp_path / "tuned"))))
    assert len(metrics(tmp_path / "tuned")) > 2 and "epochs: saved 0.0, current 1.0" in caplog.text


def timed(minutes: float, steps: int, state: RunState, saved: float = 1.0) -> RunState:
    """`continued` for a run that was to take `saved` minutes."""
    config = PretrainConfig(loop=LoopConfig(steps, minutes=minutes))
    stage = SimpleNamespace(name="pretrain", data="data", source="text", loop=config.loop)
    manifest = {"run": {"loop": {"steps": steps, "minutes": saved}}}
    return continued(Path("run"), manifest, state, config, stage)


def test_a_timed_run_is_extended_by_minutes_or_by_steps():
    done = RunState(stage="pretrain", data="data", step=50, seconds=59.0, finished=True)
    assert timed(1.0, 1000, done).finished
    assert not timed(2.0, 1000, done).finished and not timed(0.0, 1000, done).finished
    with pytest.raises(ValueError, match=r"ends after 0\.5 minutes; give a higher --loop\.minutes"):
        timed(0.5, 1000, done)
    with pytest.raises(ValueError, match=r"ends after 40 steps; give a higher --loop\.steps"):
        timed(0.0, 40, done)


def test_a_checkpoint_that_does_not_say_its_configuration_is_extended_with_a_warning(caplog):
    config = PretrainConfig(loop=LoopConfig(4))
    stage = SimpleNamespace(name="pretrain", data="data", source="text", loop=config.loop)
    done = RunState(stage="pretrain", data="data", step=2, finished=True)
    assert not continued(Path("run"), {"run": None}, done, config, stage).finished
    assert "does not say how it was configured" in caplog.text


def test_a_speedrun_of_minutes_is_not_extended(tmp_path):
    shape = TrainingShape(depth=2, context=128, step_tokens=1024, vocab_size=300)
    recipe = timed_recipe(tmp_path, "text", 1.0, shape, 2.0)
    write_config(tmp_path, recipe)
    assert as_begun(recipe) == as_begun(timed_recipe(tmp_path, "text", 1.0, shape, 7.0)) == recipe
    with pytest.raises(ValueError, match=r"loop\.minutes: saved 1\.0, current 2\.0; choose another --out"):
        as_begun(timed_recipe(tmp_path, "text", 2.0, shape, 2.0))


def test_what_is_compared_by_content_may_have_another_name(tmp_path, caplog):
    pretrain(run_of(tmp_path, 2))
    text = (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    config = run_of(tmp_path, 4, out=tmp_path / "new", resume=str(tmp_path / "old"))
    pretrain(dataclasses.replace(config, data=str(text)))
    assert steps_in(tmp_path / "new")[-1] == 3 and "moved.txt: saved" not in caplog.text

"""Metrics reach wandb, trackio and TensorBoard; whatever a tracker does, the run is the same."""

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import pytest
from helpers.small_runs import small_run

from hotlap.common.errors import Interrupted
from hotlap.train.config import StageConfig
from hotlap.train.loop import LoopConfig
from hotlap.train.pretrain import pretrain
from hotlap.train.run import trackers
from hotlap.train.run.metrics import Metrics, read_metrics
from hotlap.train.run.trackers import check_tracker, tracked

STEPS = [
    {"step": 0, "loss": 2.5, "mfu": float("nan"), "tokens": 128},
    {"step": 1, "loss": 2.25, "tokens": 256, "validation_loss": 2.375, "validation_bpb": None},
    {"step": 2, "loss": 2.125, "tokens": 384},
]
TIMES = {"tokens_per_second", "data_wait", "seconds"}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path, monkeypatch):
    """The trackers' processes find no account and no server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_BASE_URL", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(trackers, "LAST_SECONDS", 300.0)  # however busy this machine is


def need(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install 'hotlap[trackers]'")


def track(run: Path, tracker: str, steps: list[dict], first_step: int = 0) -> None:
    """Write steps to a run's metrics while a tracker follows."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({"loop": {"steps": 3}, "data": "text.txt"}))
    metrics = Metrics(run / "metrics.jsonl", first_step)
    with tracked(tracker, run):
        for values in steps:
            metrics.write(values)
    metrics.close()


def numbers(step: dict) -> dict:
    """What a tracker gets of a line of metrics.jsonl."""
    return {k: v for k, v in step.items() if k != "step" and v is not None and v == v}


def test_tensorboard_has_each_step_once_also_of_a_resumed_run(tmp_path, caplog):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "tiny" / "run"
    track(run, "tensorboard", STEPS[:2])
    track(run, "tensorboard", STEPS[1:], first_step=1)  # resumed from a checkpoint before step 1
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    got = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    for name in {name for step in STEPS for name in numbers(step)}:
        assert got.pop(name) == [(s["step"], s[name]) for s in STEPS if name in s], name
    assert not got and "text.txt" in str(found.Tensors("config")[0]) and "failed" not in caplog.text


def test_trackio_has_each_step_once_also_of_a_resumed_run(tmp_path, monkeypatch, caplog):
    need("trackio")
    run = tmp_path / "tiny" / "run"
    track(run, "trackio", STEPS[:2])
    track(run, "trackio", STEPS[1:], first_step=1)
    assert "failed" not in caplog.text
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("hotlap")
    assert found.name == "tiny/run" and found.config["data"] == "text.txt"
    logged = SQLiteStorage.get_logs("hotlap", "tiny/run")
    assert [line["step"] for line in logged] == [0, 1, 2]
    for line, step in zip(logged, STEPS, strict=True):
        assert {k: v for k, v in line.items() if k in step and k != "step"} == numbers(step)


def test_wandb_writes_a_run_offline_and_a_resumed_run_has_the_same_id(tmp_path, caplog):
    need("wandb")
    run = tmp_path / "tiny" / "run"
    track(run, "wandb", STEPS[:2])
    track(run, "wandb", STEPS[1:], first_step=1)
    first, second = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert first.name == second.name == f"run-{json.loads((run / 'tracker.json').read_text())['id']}.wandb"
    for text in (b"tiny/run", b"text.txt", b"validation_loss", b"2.375"):
        assert text in first.read_bytes(), text
    resumed = second.read_bytes()
    assert b"2.125" in resumed and b"validation_loss" not in resumed, "only step 2 was new"
    assert "failed" not in caplog.text and "stopped" not in caplog.text


FAKES = {
    "fails as it is imported": ("raise OSError('no such tracker')", "no such tracker"),
    "fails to start": ("def init(**_): raise ValueError('bad key')", "bad key"),
    "fails to log": (
        "def init(**_): pass\ndef log(values, step): raise ConnectionError('gone \\x1b[31m')", "gone"
    ),
    "fails to finish": (
        "def init(**_): pass\ndef log(values, step): pass\ndef finish(): raise ValueError('not sent')",
        "not sent",
    ),
    "ends its process": ("def init(**_): import os; os._exit(3)", "says nothing"),
    "hangs as it starts": ("def init(**_): import time; time.sleep(1000)", "has not finished"),
    "hangs as it logs": (
        "def init(**_): pass\ndef log(values, step): import time; time.sleep(1000)", "has not finished"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def untracked(tmp_path_factory) -> list[dict]:
    config = short_run(tmp_path_factory.mktemp("untracked"))
    pretrain(config)
    return without_times(config.out)


def short_run(folder: Path, **fields):
    return small_run(folder, loop=LoopConfig(6, evaluate_every=3, save_every=6), **fields)


def without_times(run: Path) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("fake", FAKES)
def test_a_tracker_that_fails_or_hangs_costs_a_warning_and_no_bit(
    tmp_path, monkeypatch, caplog, untracked, fake
):
    code, said = FAKES[fake]
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "trackio.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    if fake.startswith("hangs"):
        monkeypatch.setattr(trackers, "LAST_SECONDS", 0.0)
    config = short_run(tmp_path, tracker="trackio")
    pretrain(config)
    assert without_times(config.out) == untracked
    warnings = [r.getMessage() for r in caplog.records if "trackio has" in r.getMessage()]
    assert len(warnings) == 1 and said in warnings[0] and "\x1b" not in warnings[0]
    assert (config.out / "report.md").exists()


def test_an_interrupted_run_ends_its_tracker_too(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "import pathlib\ndef init(**_): pass\ndef log(values, step): pass\n"
        "def finish(): pathlib.Path('finished').touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(Interrupted), tracked("trackio", tmp_path / "run"):
        raise Interrupted
    assert (tmp_path / "finished").exists()


def test_a_tracker_that_is_killed_has_noted_its_run_and_what_it_has_sent(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "import time\n"
        "def init(resume, **_): print(resume, file=open('said', 'a'))\n"
        "def log(values, step): print(step, file=open('said', 'a'))\n"
        "def finish(): time.sleep(1000)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.0)  # so that it is killed at the end of the run
    identity = Path("run/tracker.json")
    for first, steps in ((0, STEPS[:2]), (1, STEPS[1:])):
        track(Path("run"), "none", steps, first)
        deadline = time.monotonic() + 60
        with tracked("trackio", Path("run")):
            while (
                not identity.exists()
                or json.loads(identity.read_text())["sent"]["trackio"] < steps[-1]["step"]
            ):
                assert time.monotonic() < deadline, "nothing is noted"
                time.sleep(0.02)
    assert Path("said").read_text().split() == ["never", "0", "1", "allow", "2"]


def test_a_tracker_may_be_added_to_a_run_and_then_gets_all_of_it(tmp_path):
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = short_run(tmp_path)
    pretrain(config)
    longer = dataclasses.replace(config.loop, steps=8)
    pretrain(dataclasses.replace(config, loop=longer, tracker="tensorboard", resume="auto"))
    found = EventAccumulator(str(config.out / "tensorboard"))
    found.Reload()
    lines = read_metrics(config.out / "metrics.jsonl")
    assert [e.step for e in found.Scalars("loss")] == list(range(8))
    assert [e.value for e in found.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_a_missing_package_is_named_before_a_run_is_made(tmp_path, monkeypatch, there):
    monkeypatch.setitem(sys.modules, "wandb", None)
    if there == "a folder":  # such as the one that wandb itself makes in the current folder
        monkeypatch.delitem(sys.modules, "wandb")
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"wandb needs the package wandb: pip install 'hotlap\[trackers\]'"):
        check_tracker("wandb")
    with pytest.raises(ImportError, match="trackers"):
        pretrain(short_run(tmp_path, tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_every_tracker_of_the_flag_has_an_adapter():
    from typing import get_args, get_type_hints

    from hotlap.train.run.tracker_process import TRACKERS

    assert get_args(get_type_hints(StageConfig)["tracker"]) == ("none", *TRACKERS)

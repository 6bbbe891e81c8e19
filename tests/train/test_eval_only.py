"""--eval-only: the validation of a checkpoint or a base, of every stage, and nothing is written."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from helpers.preference_runs import make_base, write_pairs
from helpers.ranks import run_ranks
from helpers.rl_runs import config_of
from helpers.run_functions import validating
from helpers.small_runs import small_run

from hotlap.common.files import file_sha256
from hotlap.train.config import DPOConfig, SFTConfig
from hotlap.train.dpo import optimize_preferences
from hotlap.train.loop import LoopConfig
from hotlap.train.pretrain import main, pretrain
from hotlap.train.rl import reinforce
from hotlap.train.run.metrics import read_metrics
from hotlap.train.sft import fine_tune


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """pretrain, and base, which was fine-tuned on talks.jsonl."""
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder)
    return folder


def everything(folder: Path) -> dict[Path, str]:
    return {path: file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def validation(line: dict) -> dict:
    return {name: value for name, value in line.items() if name.startswith("validation")}


def check(stage, config, folder: Path) -> None:
    """A run's newest checkpoint has the validation of its last step, to the last bit."""
    before = everything(folder)
    found = stage(dataclasses.replace(config, eval_only=True))
    last = read_metrics(config.out / "metrics.jsonl")[-1]
    assert validation(found) and found == {"steps": last["step"] + 1, **validation(last)}
    assert everything(folder) == before and not list(folder.glob(".eval-*"))


def test_of_pretraining_and_fine_tuning(runs):
    check(pretrain, small_run(runs, out=runs / "pretrain", loop=LoopConfig(6, 6, 6)), runs)
    config = SFTConfig(
        out=runs / "base", base=runs / "pretrain", data=(str(runs / "talks.jsonl"),), batch_rows=4,
        dtype="float32", compile="off", loop=LoopConfig(6, 6, 6),
    )  # fmt: skip
    check(fine_tune, config, runs)


def test_of_preferences_and_rewards(runs):
    pairs = str(write_pairs(runs / "pairs.jsonl"))
    config = DPOConfig(
        out=runs / "dpo", base=runs / "base", data=(pairs,), batch_rows=4, dtype="float32", compile="off",
        loop=LoopConfig(1, 1, 1), epochs=0,
    )  # fmt: skip
    optimize_preferences(config)
    check(optimize_preferences, config, runs)
    config = config_of(runs, "rl", runs / "base", loop=LoopConfig(1, 1, 1))
    reinforce(config)
    check(reinforce, config, runs)
    with pytest.raises(ValueError, match="nothing to validate on, which --eval-only asks for"):
        reinforce(dataclasses.replace(config, validation_questions=0, eval_only=True))


def test_of_a_new_run_is_that_of_its_base_and_of_resume_that_of_a_checkpoint(runs, capsys):
    config = small_run(runs, out=runs / "new", loop=LoopConfig(6, 6, 6), eval_only=True)
    before = everything(runs)
    main(config)
    untrained = json.loads(capsys.readouterr().out)
    main(dataclasses.replace(config, resume=str(runs / "pretrain" / "checkpoints" / "best")))
    trained = json.loads(capsys.readouterr().out)
    assert untrained["steps"] == 0 and trained["steps"] == 6
    assert trained["validation_loss"] < untrained["validation_loss"]
    assert everything(runs) == before and not (runs / "new").exists()


def test_ranks_share_the_work_and_agree(runs):
    before = everything(runs)
    found = run_ranks(2, validating, str(runs))
    last = read_metrics(runs / "pretrain" / "metrics.jsonl")[-1]
    assert found[0] == found[1]
    assert found[0]["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert everything(runs) == before


def test_sigterm_leaves_nothing_behind(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr("hotlap.train.pretrain.validation", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(small_run(tmp_path, loop=LoopConfig(2), eval_only=True))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob(".eval-*"))

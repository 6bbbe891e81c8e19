"""Scores that stay beside a run."""

import errno
import json
from pathlib import Path

import pytest
from helpers.chat_questions import random_engine

from hotlap.common.errors import DataError
from hotlap.common.files import file_sha256
from hotlap.model.manifest import FORMAT, MANIFEST, manifest_text
from hotlap.model.weights import save_model
from hotlap.train.evaluation import kept_scores, questions
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.kept_scores import KEPT


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run with a checkpoint, whose tasks have two questions each."""
    engine, folder = random_engine(), tmp_path / "run" / "checkpoints" / "step-000007"
    folder.mkdir(parents=True)
    save_model(folder, engine.model.float(), engine.tokenizer)
    files = {p.name: {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in folder.iterdir()}
    (folder / MANIFEST).write_text(manifest_text({"format": FORMAT, "ranks": 1, "files": files}))
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 3)
    for task in questions.TASKS:
        monkeypatch.setitem(questions.TASKS, task, lambda: [("dog?", "fox"), ("cat?", "fox")])
    return tmp_path / "run"


def kept(run: Path) -> dict:
    return json.loads((run / KEPT).read_text())["scores"]


def test_a_run_keeps_the_newest_score_of_each_task(run, monkeypatch):
    found = evaluate_model(EvalConfig(run, ("facts", "spelling")))
    first = kept(run)
    assert [*first] == ["facts", "spelling"]
    assert first["facts"] == found["scores"]["facts"] | {
        "date": found["date"], "device": found["device"], "dtype": found["dtype"],
        "checkpoint": "step-000007",
    }  # fmt: skip
    monkeypatch.setitem(questions.TASKS, "spelling", lambda: [("dog?", "fox")])
    evaluate_model(EvalConfig(run, ("spelling",)))
    assert kept(run)["facts"] == first["facts"] and kept(run)["spelling"]["n"] == 1


def test_a_model_that_is_no_run_gets_no_file(run, caplog):
    caplog.set_level("INFO", "hotlap")
    checkpoint = run / "checkpoints" / "step-000007"
    before = sorted(checkpoint.iterdir())
    evaluate_model(EvalConfig(checkpoint, ("facts",)))
    assert sorted(checkpoint.iterdir()) == before and not (run / KEPT).exists()
    assert caplog.text.count("is not a run's directory, so no scores are kept there; --out writes them") == 1


def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(run, monkeypatch, caplog):
    def refused(path, text):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(kept_scores, "write_object", refused)
    assert evaluate_model(EvalConfig(run, ("facts",)))["scores"]["facts"]["n"] == 2
    assert caplog.text.count("cannot be written to, so no scores are kept there; use --out") == 1


@pytest.mark.parametrize("text", ["{", '{"scores": [1]}', '{"scores": {"facts": 1}}', "{}"])
def test_a_damaged_file_is_refused_before_the_model_is_loaded(run, text, monkeypatch):
    monkeypatch.setattr(questions, "load_model", lambda *given: pytest.fail("loaded"))
    (run / KEPT).write_text(text)
    with pytest.raises(DataError, match=rf"{KEPT}.*; move it away"):
        evaluate_model(EvalConfig(run, ("facts",)))
    assert (run / KEPT).read_text() == text


def test_samples_alone_leave_the_file_as_it_is(run):
    evaluate_model(EvalConfig(run, ("samples",)))
    assert not (run / KEPT).exists()

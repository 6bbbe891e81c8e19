"""Reports and metrics of runs."""

import json

import pytest
from helpers.small_runs import small_run

from hotlap.common.errors import DataError
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import Metrics, read_metrics
from hotlap.train.run.report import write_report


def test_a_run_ends_with_a_report_and_its_curves(tmp_path):
    config = small_run(tmp_path)
    last = pretrain(config)
    text = (config.out / "report.md").read_text()
    assert (config.out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "(curves.png)" in text
    assert "| steps | 12 |" in text and f"| tokens | {12 * 4 * 32:,} |" in text
    assert f"| validation bits per byte | {last['validation_bpb']:.4f} |" in text
    assert '"matrix_lr": 0.02' in text
    (config.out / "report.md").unlink()
    assert write_report(config.out).read_text() == text


def test_utilisation_of_an_unknown_device_is_not_a_number(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    line = {"step": 0, "loss": 2.0, "tokens_per_second": 5.0, "seconds": 1.0, "tokens": 5}
    metrics.write(line | {"mfu": None})
    metrics.close()
    assert "| MFU (nanochat's formula) | n/a" in write_report(tmp_path).read_text()
    Metrics(tmp_path / "metrics.jsonl").write(line | {"mfu": 0.415})
    assert "| MFU (nanochat's formula) | 41.5%" in write_report(tmp_path).read_text()


def test_resumed_metrics_drop_the_lines_of_repeated_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in range(5):
        first.write({"step": step, "loss": float("inf") if step == 1 else 0.5})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # cut short by a kill
    Metrics(path, first_step=3).write({"step": 3, "loss": 0.25})
    assert read_metrics(path) == [
        {"step": 0, "loss": 0.5},
        {"step": 1, "loss": None},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_run_without_steps_has_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="has not completed a step"):
        write_report(tmp_path)

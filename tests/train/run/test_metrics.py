"""A damaged metrics.jsonl stops no run and no report, and nothing in it is lost without a word."""

import contextlib
import dataclasses
import resource

import pytest
from helpers.small_runs import small_run

from hotlap.train.loop import LoopConfig
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import METRICS, Metrics, read_metrics
from hotlap.train.run.report import write_report

WHOLE = b'{"step": 0, "loss": 2.0}\n'
RUBBISH = {
    "binary": b"\x00\xff\xfe\x80",
    "half a line": b'{"step": 1, "lo',
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "no step": b'{"loss": 1}',
    "NaN as step": b'{"step": NaN}',
    "text as step": b'{"step": "1"}',
    "a fraction as step": b'{"step": 1.5}',
    "a negative step": b'{"step": -1}',
    "deep": b"[" * 100_000,
    "a long number": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_lines_that_cannot_be_read_are_left_out_counted_and_kept(tmp_path, rubbish, caplog):
    path = tmp_path / "metrics.jsonl"
    raw = WHOLE + rubbish + b"\n" + rubbish + b'\n{"step": 1, "loss": NaN}\n'
    path.write_bytes(raw)
    assert read_metrics(path) == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}]
    assert caplog.text.count("2 lines cannot be read") == 1
    caplog.clear()
    Metrics(path, first_step=1).close()
    assert read_metrics(path) == [{"step": 0, "loss": 2.0}]
    (aside,) = tmp_path.glob("aside-metrics.jsonl-*")
    assert aside.read_bytes() == raw and caplog.text.count(aside.name) == 1


def test_a_last_line_cut_short_is_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + RUBBISH["half a line"])
    Metrics(path, first_step=1).close()
    assert path.read_bytes() == WHOLE and "1 line cannot be read" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_goes_on_beside_a_folder_named_metrics(tmp_path, caplog):
    config = small_run(tmp_path, loop=LoopConfig(2, save_every=1))
    pretrain(config)
    path = config.out / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    (path / "mine").touch()
    loop = dataclasses.replace(config.loop, steps=3)
    pretrain(dataclasses.replace(config, loop=loop, resume="auto"))
    assert [line["step"] for line in read_metrics(path)] == [1, 2] and "is not a file" in caplog.text
    assert (next(config.out.glob("aside-metrics.jsonl-*")) / "mine").exists()


def test_a_report_shows_what_can_be_read(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(
        'rubbish\n{"step": 3, "loss": "x", "tokens": [1], "tokens_per_second": 1e999}\n'
        '{"step": 4, "loss": 1.5, "tokens": 2000, "validation_loss": {}}\n'
    )
    (tmp_path / "config.json").write_text("[")
    text = write_report(tmp_path).read_text()
    for row in ("steps | 5", "tokens | 2,000", "loss | 1.5000", "validation loss | n/a", "(median) | n/a"):
        assert row in text
    assert "1 line cannot be read" in caplog.text and "report is without the configuration" in caplog.text


def test_a_full_disk_is_told_with_the_file(tmp_path):
    metrics = Metrics(tmp_path / METRICS)
    with room_for(100), pytest.raises(OSError) as failed:
        try:
            for step in range(100):
                metrics.write({"step": step})
        finally:
            metrics.close()
    assert failed.value.filename == str(tmp_path / METRICS)


@contextlib.contextmanager
def room_for(size: int):
    """Writes beyond this many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

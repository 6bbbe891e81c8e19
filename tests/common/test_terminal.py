"""Nothing that is printed steers the terminal, or fails to be printed."""

import io
import json
import os
from pathlib import Path

import pytest

from hotlap.bench import compare
from hotlap.common import files
from hotlap.common.errors import guarded, known
from hotlap.common.log import log, set_up_logging
from hotlap.common.terminal import lenient, printable
from hotlap.train import pretrain

ESCAPES = "a\x1b[31mred\x9b2J\r\x07"


def test_nothing_that_steers_a_terminal_is_printable():
    controls = "".join(map(chr, [*range(32), *range(127, 160)]))
    assert printable(controls) == "\t\n"
    assert printable(ESCAPES) == "a[31mred2J"
    assert printable("name\u202egnp.exe\u2066") == "namegnp.exe"
    assert printable("one\u2028two") == "one\ntwo"


def test_text_in_any_language_is_printable():
    text = "naïve 猫 😀 👩‍👩‍👧 é שלום"
    assert printable(text) == text


def test_a_name_that_is_not_utf8_can_be_encoded_and_keeps_its_bytes_in_files(tmp_path):
    name = os.fsdecode(b"runs/\xff\x9b")
    assert printable(name).encode("utf-8") == "runs/\ufffd\ufffd".encode()
    files.write(tmp_path / "report.md", name)
    assert (tmp_path / "report.md").read_bytes() == b"runs/\xff\x9b"


def test_a_terminal_without_unicode_shows_question_marks():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    lenient(stream)
    stream.write("猫!")
    stream.flush()
    assert stream.buffer.getvalue() == b"?!"
    lenient(io.StringIO())  # a notebook's stream cannot be changed


@pytest.mark.parametrize(
    "error", [ValueError(ESCAPES), OSError(2, "No such file", ESCAPES), KeyError(ESCAPES)]
)
def test_an_error_steers_no_terminal(error, capsys):
    def fail():
        raise error

    assert guarded(fail, debug=False)
    printed = capsys.readouterr().err
    assert printable(printed) == printed and printed.count("\n") == 1


def test_a_suggestion_steers_no_terminal(capsys):
    assert guarded(lambda: known("colour", ["colou\x9br"], "key"), debug=False) == 2
    assert "\x9b" not in capsys.readouterr().err


def test_the_log_steers_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", log.propagate)
    monkeypatch.setattr(log, "level", log.level)
    set_up_logging()
    log.warning("%s: saved", ESCAPES)
    assert capsys.readouterr().err == "a[31mred2J: saved\n"


def test_a_result_file_and_the_name_of_a_run_steer_no_terminal(tmp_path, monkeypatch, capsys):
    row = {"case": ESCAPES, "provider": "hotlap", "ms": 1.0, "ms_low": 1.0, "ms_high": 1.0}
    content = {"kind": "kernels", "device": "a CPU", "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    compare.main(compare.CompareConfig(tmp_path / "a.json", tmp_path / "a.json"))
    monkeypatch.setattr(pretrain, "pretrain", lambda config: {})
    pretrain.main(pretrain.PretrainConfig(out=Path(ESCAPES)))
    printed = capsys.readouterr().out
    assert "red" in printed and printable(printed) == printed

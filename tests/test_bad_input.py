"""Bad input is one line at once that says what was given and what to do, and leaves nothing behind.

The rows are in tests/helpers/bad_*.py, by what is wrong: flags, data, models, runs, and studies and benchmarks.
bad_files.py has the builders of wrong files.
"""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import bad_data, bad_flags, bad_models, bad_runs, bad_studies
from helpers.commands import SMALL, sft_here
from helpers.small_runs import write_conversations, write_text

from hotlap.cli import main

ROWS = [row for area in (bad_flags, bad_data, bad_models, bad_runs, bad_studies) for row in area.ROWS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with one of everything."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_text(Path("text.txt"))
        write_conversations(Path("talks.jsonl"))
        commands = [
            ["tokenizer", "--source", "text.txt", "--vocab-size", "280"],
            ["data", "--source", "text.txt", "--out", "shards"],
            ["pretrain", "--data", "text.txt", "--tokenizer", "characters", "--out", "base", *SMALL],
        ]
        assert [main(command) for command in commands] == [0, 0, 0] and sft_here(Path("base")) == 0
        assert main(["export", "weights", "--model", "sft", "--out", "model"]) == 0
    return folder


def listing(folder: Path) -> dict[str, int]:
    """The sizes of all files but locks, which name the process that held them last."""
    files = (path for path in folder.rglob("*") if path.name != "run.lock")
    return {str(path.relative_to(folder)): path.lstat().st_size for path in files}


@pytest.mark.parametrize(("arguments", "build", "code", "pattern"), ROWS, ids=[row[0][-60:] for row in ROWS])
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, build, code, pattern, made, tmp_path, monkeypatch, capsys
):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if build:
        build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    before = [listing(tmp_path), listing(made)]
    given = shlex.split(arguments)
    capsys.readouterr()
    found = main(given)
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert found == code and len(errors) == 1 and lines[-1] == errors[0], printed.err
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in printed.out + printed.err and "a bug" not in printed.err
    assert [listing(tmp_path), listing(made)] == before

"""The file of earlier inputs."""

import json

import pytest

from hotlap.serve.terminal.history import LONGEST, MOST, History


class Readline:
    """What `History` needs of Python's readline."""

    def __init__(self):
        self.entries, self.set_auto_history = [], lambda on: None

    def add_history(self, text: str) -> None:
        self.entries.append(text)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "hotlap" / "history"


def session(*inputs: str) -> list[str]:
    """What a session that gets these inputs remembers of earlier ones."""
    history = History(Readline())
    before = list(history.readline.entries)
    for text in inputs:
        history.add(text)
    return before


def test_the_last_thousand_inputs_are_kept(file):
    session(*(str(number) for number in range(MOST + 5)))
    assert session() == [str(number) for number in range(5, MOST + 5)]
    assert len(file.read_text().splitlines()) == MOST


def test_inputs_of_any_characters_and_lines_come_back_as_they_were(file):
    inputs = ["a\nb\n", "\u2028\x85 猫", '"quoted"', "null", "\\n"]
    session(*inputs)
    assert session() == inputs


def test_an_input_that_is_repeated_or_very_long_is_not_kept_again(file):
    session("a", "a", "x" * (LONGEST + 1), "b")
    assert session() == ["a", "b"]


def test_two_sessions_at_once_lose_nothing_of_each_other(file):
    one, other = History(Readline()), History(Readline())
    for number in range(3):
        one.add(f"one {number}")
        other.add(f"other {number}")
    assert session() == [f"{who} {number}" for number in range(3) for who in ("one", "other")]


@pytest.mark.parametrize("line", ["not JSON", "[1]", "12", "\udcff"])
def test_a_line_that_is_no_string_is_an_input_as_it_is(line, file):
    file.parent.mkdir()
    file.write_bytes((line + '\n"next"\n').encode(errors="surrogateescape"))
    assert session() == [line.replace("\udcff", "\ufffd"), "next"]


def test_only_the_owner_may_read_the_file(file):
    session("secret")
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(file.read_text()) == "secret"


def test_a_file_that_cannot_be_read_or_written_costs_one_note(file, capsys):
    file.mkdir(parents=True)
    session("a", "b")
    assert capsys.readouterr().err.count("[inputs are not kept for the next session: ") == 1

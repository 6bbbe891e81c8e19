"""The cache folder, and writing whole files."""

import errno
import os
from pathlib import Path

import pytest

from hotlap.common import files
from hotlap.common.errors import DataError


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_in_the_home_folder_where_nothing_else_is_said(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert files.cache_folder() == tmp_path / ".cache" / "hotlap"


def test_the_cache_is_where_xdg_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.cache_folder() == Path("/elsewhere/hotlap")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    files.write(path, "first\r\né")
    assert path.read_bytes() == "first\r\né".encode()
    with pytest.raises(UnicodeEncodeError):
        files.write(path, "half of it " * 10_000 + "\ud800")
    assert path.read_bytes() == "first\r\né".encode()
    files.write(path, "second")
    assert path.read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_fails_names_the_path_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write(path, "old")

    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*result\.json'") as raised:
        files.write(path, "new")
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "talk.jsonl"
    files.append(path, "é\n")
    files.append(path, "b\n")
    assert path.read_text() == "é\nb\n"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.append(Path("/dev/full"), "c\n")
    with pytest.raises(FileNotFoundError, match="none/talk"):
        files.append(tmp_path / "none" / "talk.jsonl", "c\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[1]", "no JSON object but '\\[1\\]'"),
        ("null", "no JSON object but 'None'"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff{}", "not JSON"),
    ],
)
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"config.json.*{says}"):
        files.read_object(path)


def test_a_json_object_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_object(tmp_path / "config.json") == {"a": 1}

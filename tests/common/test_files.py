"""The cache folder, and writing whole files."""

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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_text_are_read_in_the_encoding_that_its_mark_names(tmp_path, encoding, end):
    path = tmp_path / "a.txt"
    path.write_bytes(f"é\u2028{end}{end}😀".encode(encoding))
    assert list(files.text_lines(path)) == [(1, "é\u2028"), (2, ""), (3, "😀")]


def test_the_line_with_bytes_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n" * 9000 + "né\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt:9001: byte 0xe9 at character 2 is not UTF-8"):
        list(files.text_lines(path))

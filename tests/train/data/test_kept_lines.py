"""Records that are made once."""

import gzip
import random

import pytest

from hotlap.common.errors import DataError
from hotlap.train.data import kept_lines as lines
from hotlap.train.data.kept_lines import distinct_shuffled, keep_lines, kept_lines


def test_texts_come_back_once_each_in_an_order_that_does_not_depend_on_theirs(tmp_path):
    texts = [f"Text number {i}, ümlaut\nand a second line.\n" for i in range(200)]
    found = list(distinct_shuffled([*texts, *(text.upper() for text in texts)], tmp_path))
    assert sorted(found) == sorted(texts) and found != texts
    random.Random(0).shuffle(texts)
    assert list(distinct_shuffled(texts, tmp_path)) == found
    assert list(tmp_path.iterdir()) == []


def test_halves_of_characters_do_not_stop_a_text(tmp_path):
    assert list(distinct_shuffled(["one \ud83d"], tmp_path)) == ["one ?"]


def test_nothing_is_kept_after_an_error(tmp_path):
    def failing():
        yield "text"
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        keep_lines(tmp_path / "new" / "a.jsonl.gz", failing())
    assert list((tmp_path / "new").iterdir()) == []


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    assert keep_lines(path, ["a", ["b", 2]]) == 2 and list(kept_lines(path)) == ["a", ["b", 2]]
    for content in (path.read_bytes()[:-5], b"text", gzip.compress(b"{")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path} is damaged .*; delete it and retry"):
            list(kept_lines(path))


def test_a_full_disk_is_known_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LARGEST", 1 << 60)
    with pytest.raises(OSError, match=r"only .* are free"):
        keep_lines(tmp_path / "a.jsonl.gz", (1 / 0 for _ in "a"))

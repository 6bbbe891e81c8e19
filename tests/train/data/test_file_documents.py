"""The documents in a file: its encoding, its format, and what cannot be read."""

import bz2
import json
import logging
import lzma
import sys
import zipfile

import pytest

from hotlap.common.errors import DataError
from hotlap.train.data import file_documents as module
from hotlap.train.data.file_documents import file_documents


def documents(path, errors="strict"):
    return list(file_documents(path, errors))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_text_is_the_same_in_every_encoding_and_with_every_line_end(tmp_path, encoding, newline):
    (tmp_path / "a.txt").write_bytes("Grüße\n猫😀\n\nfin\n".replace("\n", newline).encode(encoding))
    assert documents(tmp_path / "a.txt") == ["Grüße\n猫😀\n\nfin\n"]
    lines = "".join(json.dumps({"text": text}) + newline for text in ("eins", "zwei\n"))
    (tmp_path / "b.JSONL").write_bytes(lines.encode(encoding))
    assert documents(tmp_path / "b.JSONL") == ["eins", "zwei\n"]


def test_big_endian_utf16_with_its_mark_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "héé".encode("utf-16-be"))
    assert documents(tmp_path / "a.txt") == ["héé"]


def test_bytes_that_are_not_utf8_are_named_or_replaced_and_counted(tmp_path, caplog):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait, caf\xe9 noir")
    with pytest.raises(
        DataError, match=r"latin\.txt is not UTF-8 at byte 3 \(line 1: 0xe9\).*iconv -f cp1252"
    ):
        documents(path)
    with caplog.at_level(logging.INFO, "hotlap"):
        assert documents(path, "replace") == ["caf\ufffd au lait, caf\ufffd noir"]
    assert caplog.messages == [f"{path}: 2 U+FFFD, for bytes that are not text"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_the_place_of_a_bad_byte_is_right_wherever_blocks_end(tmp_path, monkeypatch, mark, block):
    monkeypatch.setattr(module, "BLOCK", block)
    for cut in ("é".encode()[:1], "猫".encode()[:2], b"\x93"):
        start = mark + "füß\n".encode() * 5 + b"x"
        for rest in (b"\nmore\n", b""):
            (tmp_path / "a.txt").write_bytes(start + cut + rest)
            with pytest.raises(DataError, match=rf"at byte {len(start)} \(line 6: 0x{cut[0]:02x}\)"):
                documents(tmp_path / "a.txt")


def test_a_nul_in_text_is_named_by_its_line_or_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 5000 + "a\0b\n")
    with pytest.raises(DataError, match=r"a\.txt:5001: a NUL character"):
        documents(path)
    assert documents(path, "replace") == ["line\n" * 5000 + "a\ufffdb\n"]


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: bz2.compress(b"text"), "compressed by bzip2"),
        (lambda path: lzma.compress(b"text"), "compressed by xz"),
        (zipped, "a zip archive"),
        (lambda path: b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        (lambda path: b"ARROW1\0\0", "an Arrow file without that ending"),
        (lambda path: b"%PDF-1.7\n", "a PDF"),
        (lambda path: b"text\0text", "binary or compressed"),
        (lambda path: "text".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_binary_file_is_named_as_what_it_is(tmp_path, make, what, name):
    path = tmp_path / name
    path.write_bytes(make(path))
    for errors in ("strict", "replace"):
        with pytest.raises(DataError, match=rf"{name} is .*{what}"):
            documents(path, errors)


def test_a_jsonl_line_is_a_document(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "one\nline"}) + "\n\n" + json.dumps({"text": "two", "id": 3}) + "\n")
    assert documents(path) == ["one\nline", "two"]
    assert documents(path.rename(tmp_path / "two.json")) == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": 3}', "`text` is 3, not a string"), ('{"text": null}', "`text` is null, not a string"),
        ('{"body": "x"}', 'no field `text` among ["body"]'), ('["text"]', "a JSON array"),
        ('{"messages": []}', "a conversation, which is data for `hotlap sft`"),
        ('{"text": "x"', "not JSON (Expecting"), ("text", "not JSON"), ("5", "5, not an object"),
        ('{"a":' * 10**5, "not JSON that Python can read"), ("{", "not JSON"), ("[", "a JSON array"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_a_bad_jsonl_line_is_named_with_what_was_found(tmp_path, line, found):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        documents(path)
    assert str(caught.value).startswith(f"{path}:2: {found}") and 'must be {"text"' in str(caught.value)


def test_half_a_character_in_json_is_replaced_and_counted(tmp_path, caplog):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "a \\ud83d b \\ud83d\\ude00 \\ude00"}\n')
    with caplog.at_level(logging.INFO, "hotlap"):
        assert documents(path) == ["a \ufffd b 😀 \ufffd"]
    assert caplog.messages == [f"{path}: 2 halves of characters (such as \\ud83d) became U+FFFD"]


def test_a_line_separator_inside_a_jsonl_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "u2028.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", "utf-8")
    assert documents(path) == ["a\u2028b\x85c"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_an_empty_document(tmp_path, name):
    (tmp_path / name).write_text("")
    assert documents(tmp_path / name) == [""]


def test_a_long_document_is_cut_after_lines_or_words_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "LONGEST", 100)
    monkeypatch.setattr(module, "BLOCK", 30)
    texts = ["a line of text\n" * 50, "some words " * 50, "x" * 550, "x" * 100, "y" * 10 + "\n" + "z" * 105]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
        parts = documents(tmp_path / f"{i}.txt")
        assert "".join(parts) == text and all(0 < len(part) <= 100 for part in parts)
        assert i > 1 or all(part[-1] in "\n " for part in parts)
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with caplog.at_level(logging.INFO, "hotlap"):
        assert "".join(documents(path)) == "".join(texts)
    assert caplog.messages[-1].startswith(f"{path}: cut 4 documents of more than 100 characters into ")


def write_parquet(path, columns: dict, **settings):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def test_a_row_of_a_parquet_file_is_a_document_and_nulls_are_counted(tmp_path, caplog):
    texts = [f"text {i}" for i in range(3000)]
    path = tmp_path / "a.PARQUET"
    write_parquet(path, {"id": range(3001), "text": [*texts, None]}, row_group_size=700)
    with caplog.at_level(logging.INFO, "hotlap"):
        assert documents(path) == texts
    assert caplog.messages == [f"{path}: left out 1 rows whose text is null"]


def test_a_parquet_file_without_text_or_damaged_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})
    with pytest.raises(DataError, match=r"a\.parquet has int in the column `text`"):
        documents(path)
    write_parquet(path, {"body": ["x"]})
    with pytest.raises(DataError, match=r"a\.parquet has the columns .* it needs `text`"):
        documents(path)
    raw = write_parquet(path, {"text": [f"text {i}" for i in range(1000)]}, compression="zstd").read_bytes()
    for damaged in (b"", raw[:-4], raw[: len(raw) // 2], raw[:50] + bytes(2000) + raw[2050:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is damaged, or not a parquet file"):
            documents(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'hotlap\[data\]'"):
        documents(path)

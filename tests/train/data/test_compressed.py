"""Compressed files are read as what is in them, or refused, in bounded memory."""

import gzip
import json
import random
import sys

import pytest
from helpers.memory import peak_memory

from hotlap.common.errors import DataError
from hotlap.train.data import compressed
from hotlap.train.data.conversation_files import read_conversations
from hotlap.train.data.file_documents import file_documents
from hotlap.train.data.prompt_files import read_prompts
from hotlap.train.data.text_files import text_files

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["eins\nGrüße 猫", "zwei", "drei" * 5000]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SKIPPED = b"\x50\x2a\x4d\x18\4\0\0\0what"  # a frame of zstd that holds no data, as pzstd writes first


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 1)


COMPRESS = {".gz": gzipped, ".zst": zstd}
every = pytest.mark.parametrize("ending", COMPRESS)


def documents(path):
    return list(file_documents(path, "strict"))


@every
@pytest.mark.parametrize("name", ["a.jsonl{}", "A.JSON{}", "a.jsonl"])
def test_compressed_lines_are_the_documents_of_the_plain_file_whatever_the_name_says(tmp_path, ending, name):
    path = tmp_path / name.format(ending)
    path.write_bytes(COMPRESS[ending](LINES))
    assert documents(path) == TEXTS


@every
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_compressed_text_has_encodings_and_line_ends_too(tmp_path, ending, encoding):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending]("Grüße\r\n猫\r\n".encode(encoding)))
    assert documents(path) == ["Grüße\n猫\n"]
    path.write_bytes(COMPRESS[ending]("Grüße\nund é".encode("cp1252")))
    with pytest.raises(DataError, match=r"not UTF-8 at byte 2 \(line 1: 0xfc\)"):
        documents(path)


@every
def test_several_members_or_frames_are_read_to_the_end(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    compress = COMPRESS[ending]
    path.write_bytes(compress(LINES) + compress(b"") + compress(LINES) + compress(LINES[:-1]))
    assert documents(path) == TEXTS * 3


def test_frames_of_zstd_without_data_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(SKIPPED + zstd(LINES) + SKIPPED + zstd(LINES) + SKIPPED)
    assert documents(path) == TEXTS * 2


@every
@pytest.mark.parametrize("members", [1, 2])
def test_a_file_that_is_cut_short_or_damaged_is_refused_with_the_place(tmp_path, ending, members):
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending](random.Random(0).randbytes(3000).hex().encode())
    parts = [whole[:cut] for cut in (5, len(whole) // 2, len(whole) - 1)]
    parts += [whole + b"more", whole + b"XX" + whole, whole[:20] + b"\xff" * 20 + whole[40:]]
    for part in parts[: None if ending == ".gz" else -1]:  # these frames of zstd have no checksum
        path.write_bytes(whole * (members - 1) + part)
        with pytest.raises(DataError, match=r"a\.jsonl\.\w+, after [0-9,]+ bytes .* (cut short|damaged)"):
            documents(path)


def test_what_is_not_compressed_as_its_name_says_or_compressed_twice_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match=r"a\.txt\.gz is not compressed by gzip, as its name says; rename it"):
        documents(path)
    path.write_bytes(gzip.compress(zstd(LINES)))
    with pytest.raises(DataError, match=r"a\.txt\.gz is compressed twice \(zstd inside of gzip\)"):
        documents(path)
    path.write_bytes(gzip.compress(b"PAR1\0\0"))
    with pytest.raises(DataError, match=r"a\.txt\.gz is parquet without that ending"):
        documents(path)


@every
def test_what_expands_more_than_text_does_is_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](b"a" * 2_000_000))
    with pytest.raises(DataError, match=r"a\.txt\.\w+ expands more than 200 times, to over 1 MB"):
        documents(path)
    monkeypatch.setattr(compressed, "FREE", 2_000_000)
    assert documents(path) == ["a" * 2_000_000]


def test_a_window_of_zstd_that_takes_much_memory_is_refused(tmp_path):
    path = tmp_path / "a.txt.zst"
    frame = b"(\xb5/\xfd" + bytes([0x04, (28 - 10) << 3]) + b"\x01\x00\x00"  # a window of 2^28 bytes
    path.write_bytes(frame)
    with pytest.raises(DataError, match=r"needs a window of more than 128 MB; compress it again"):
        documents(path)


def test_without_pyarrow_gzip_is_read_and_zstd_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert documents(tmp_path / "a.jsonl.gz") == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b"")[:4])
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst, compressed by zstd, needs pyarrow: pip install"):
        documents(tmp_path / "a.jsonl.zst")


@every
def test_conversations_and_prompts_may_be_compressed(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    record = json.dumps({"messages": TALK, "prompt": "a"})
    path.write_bytes(COMPRESS[ending](f"{record}\n{record}\n".encode()))
    assert list(read_conversations(path)) == [(f"{path}:{i}", TALK) for i in (1, 2)]
    assert [messages for _, messages, _ in read_prompts(path)] == [TALK[:1]] * 2


def test_a_folder_s_compressed_texts_are_read(tmp_path):
    for name in ("a.txt.gz", "b.JSONL.ZST", "c.tar.gz", "d.gz", "e.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in text_files(str(tmp_path))] == ["a.txt.gz", "b.JSONL.ZST", "e.txt"]


READ = """
from pathlib import Path
from hotlap.train.data.file_documents import file_documents
assert sum(map(len, file_documents(Path({path!r}), "strict"))) == {size}
"""


@pytest.mark.parametrize(("ending", "line"), [(".gz", 16_000_000), (".zst", 10_000)])
def test_memory_does_not_grow_with_what_is_in_a_file(tmp_path, ending, line):
    peaks = []
    text = ("word " * (line // 5))[:-1] + "\n"
    for size in (16_000_000, 64_000_000):
        path = tmp_path / f"{size}.txt{ending}"
        path.write_bytes(COMPRESS[ending](text.encode() * (size // line)))
        peaks.append(peak_memory(READ.format(path=str(path), size=size)))
    assert peaks[1] - peaks[0] < 10_000_000  # if all of it were held: 48 MB at least

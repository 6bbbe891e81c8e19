"""Shards: what is written, what is read, and what is refused."""

import struct

import numpy as np
import pytest

from hotlap.common.errors import DataError
from hotlap.train.data import shards as shard_files
from hotlap.train.data.shards import (
    HEADER_BYTES,
    MAGIC,
    encoded,
    fingerprint,
    first_shards,
    read_shard,
    shard_documents,
    shard_paths,
    write_shard,
    write_shards,
)


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_a_shard_holds_what_was_written_in_the_smallest_type(tmp_path, vocab_size, bytes_each):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1000)
    tokens[500] = vocab_size - 1
    write_shard(tmp_path / "train_000000.bin", tokens, vocab_size)
    assert (tmp_path / "train_000000.bin").stat().st_size == HEADER_BYTES + 1000 * bytes_each
    assert (read_shard(tmp_path / "train_000000.bin", vocab_size) == tokens).all()
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin"]


def test_a_shard_in_llm_c_s_format_is_read(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, 5, *[0] * 253) + struct.pack("<5H", 9, 1, 2, 9, 3))
    documents = shard_documents(path, vocab_size=10, bos=9)
    assert documents.tokens.tolist() == [9, 1, 2, 9, 3] and documents.starts.tolist() == [0, 3]
    assert shard_paths(tmp_path, "validation") == [path]


def test_documents_are_encoded_in_order_whatever_the_batches(tmp_path, tiny_tokenizer, monkeypatch):
    texts = [f"{'word ' * (i % 37)}{i}\n" for i in range(200)] + [""]
    one_by_one = [[tiny_tokenizer.bos, *tiny_tokenizer.encode(text)] for text in texts]
    for characters in (1, 100, 1 << 20):
        monkeypatch.setattr(shard_files, "CHARACTERS_AT_ONCE", characters)
        assert [t.tolist() for t in encoded(iter(texts), tiny_tokenizer)] == one_by_one
    monkeypatch.setattr(shard_files, "SHARD_TOKENS", 1000)
    count = write_shards(tmp_path, "train", iter(texts), tiny_tokenizer)
    shards = [read_shard(path, tiny_tokenizer.vocab_size) for path in shard_paths(tmp_path, "train")]
    assert np.concatenate(shards).tolist() == [i for ids in one_by_one for i in ids] and count == sum(
        map(len, shards)
    )
    assert all(shard[0] == tiny_tokenizer.bos and 1000 <= len(shard) < 1200 for shard in shards[:-1])


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "train_000000.bin", np.arange(10), 300)
    assert list(tmp_path.iterdir()) == []


def header(magic=MAGIC, version=1, count=4) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253)


BODY = struct.pack("<4H", 9, 1, 2, 3)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "0 bytes"),
        (header()[:100], "100 bytes"),
        ((header() + BODY)[:-2], "1030 bytes"),
        ((header() + BODY)[:-1], "1031 bytes"),
        (header() + BODY + b"\0", "1033 bytes"),
        (header(count=0), "0 tokens"),
        (header(count=-4) + BODY, "-4 tokens"),
        (header(magic=20240521) + BODY, "magic 20240521"),
        (header(version=7) + BODY, "version 7"),
        (header(version=2) + BODY, "4 tokens, which take 1040"),
        (header() + struct.pack("<4H", 9, 1, 10, 3), "token id 10 at byte 1028"),
    ],
    ids=[
        "empty",
        "no header",
        "truncated",
        "odd",
        "longer",
        "none",
        "negative",
        "magic",
        "version",
        "type",
        "id",
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, raw, says):
    path = tmp_path / "train_000003.bin"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=says) as caught:
        read_shard(path, vocab_size=10)
    assert str(path) in str(caught.value)


def test_the_fingerprint_sees_other_data_under_the_same_names(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(10), 100)
    before = fingerprint([path])
    assert before == fingerprint([path])
    write_shard(path, np.arange(10)[::-1], 100)
    assert before != fingerprint([path])


def test_the_first_tokens_of_a_split_may_end_within_a_shard(tmp_path):
    paths = []
    for i, count in enumerate((10, 10, 10)):
        paths.append(tmp_path / f"validation_{i:06d}.bin")
        write_shard(paths[-1], np.arange(10 * i, 10 * i + count), 100)
    assert first_shards(paths, 0) == [(path, None) for path in paths]
    assert first_shards(paths, 9) == [(paths[0], None)]
    assert first_shards(paths, 14) == [(paths[0], None), (paths[1], 5)]
    with pytest.raises(DataError, match="3 tokens fewer"):
        first_shards(paths, 30)
    cut = shard_documents(paths[1], 100, bos=13, limit=5)
    assert cut.tokens.tolist() == [10, 11, 12, 13, 14, 15] and cut.starts.tolist() == [0, 3]

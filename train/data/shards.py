"""Token shards, in the .bin format of llm.c and modded-nanogpt.

A shard is a header of 256 int32 (magic, version, count) and the tokens, as uint16 (version 1) or uint32
(version 2). Each document starts with the beginning-of-document token.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.files import naming

if TYPE_CHECKING:  # benchmarks read shards where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

MAGIC = 20240520
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
CHARACTERS_AT_ONCE = 1 << 21  # in a batch of documents to encode
TOKEN_TYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by version


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write a shard, completely or not at all."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, version(vocab_size), len(tokens)
    partial = path.with_suffix(".partial")
    try:
        with naming(path), open(partial, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(TOKEN_TYPES[version(vocab_size)], copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def version(vocab_size: int) -> int:
    """The version of the shard format with the smallest type that holds all ids."""
    return 1 if vocab_size <= 1 << 16 else 2


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a shard (count,), memory-mapped. DataError if it is damaged or has ids beyond the
    vocabulary.
    """
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes are less than a shard's header of {HEADER_BYTES}")
    magic, form, count = (int(n) for n in np.fromfile(path, "<i4", 3))
    if magic != MAGIC or form not in TOKEN_TYPES:
        raise DataError(f"{path}: magic {magic}, version {form}; a shard has magic {MAGIC}, version 1 or 2")
    dtype = TOKEN_TYPES[form]
    if count < 1 or size != HEADER_BYTES + count * dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes, but its header says {count} tokens, which take "
            f"{HEADER_BYTES + count * dtype.itemsize}; make or download it again"
        )
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    for start in range(0, count, 1 << 24):
        part = tokens[start : start + (1 << 24)]
        if (largest := int(part.max())) >= vocab_size:
            offset = HEADER_BYTES + (start + int(part.argmax())) * dtype.itemsize
            raise DataError(
                f"{path}: token id {largest} at byte {offset}, but the vocabulary has {vocab_size}; "
                "use the tokenizer that the shard was made with"
            )
    return tokens


def write_shards(folder: Path, split: str, texts: Iterable[str], tokenizer: Tokenizer) -> int:
    """Encode documents into shards split_000000.bin, ..., each filled until it has 100M tokens. Returns the
    number of tokens.
    """
    shards = total = held = 0
    parts: list[np.ndarray] = []

    def flush() -> None:
        nonlocal shards, held
        path = folder / f"{split}_{shards:06d}.bin"
        write_shard(path, np.concatenate(parts), tokenizer.vocab_size)
        parts.clear()
        shards, held = shards + 1, 0

    for tokens in encoded(texts, tokenizer):
        parts.append(tokens)
        held += len(tokens)
        total += len(tokens)
        if held >= SHARD_TOKENS:
            flush()
    if parts:
        flush()
    if not shards:
        raise DataError(f"no documents for the {split} split; name a source with text in it")
    return total


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document, in a shard's type, after a beginning-of-document token. The tokenizer
    encodes batches of documents on several threads.
    """
    dtype = TOKEN_TYPES[version(tokenizer.vocab_size)]
    batch: list[str] = []
    characters = 0
    for text in chain(texts, [None]):
        if text is None or (batch and characters + len(text) > CHARACTERS_AT_ONCE):
            for ids in tokenizer.encode_batch(batch):
                yield np.array([tokenizer.bos, *ids], dtype)
            batch, characters = [], 0
        if text is not None:
            batch.append(text)
            characters += len(text)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split in a folder, in order, also those with llm.c's and modded-nanogpt's names."""
    also = {"train": "train", "validation": "val"}[split]
    found = sorted({*folder.glob(f"{split}_*.bin"), *folder.glob(f"*_{also}_*.bin")})
    if not found:
        raise FileNotFoundError(f"no shards {split}_*.bin in {folder}; make some with `hotlap data`")
    return found


def shard_tokens(path: Path) -> int:
    """Number of tokens of a shard, by its header."""
    return int(np.fromfile(path, "<i4", 3)[2])


def first_shards(paths: list[Path], limit: int) -> list[tuple[Path, int | None]]:
    """The first shards with `limit` targets in all (0: no limit), and how many to use of each (None: all)."""
    if not limit:
        return [(path, None) for path in paths]
    found = []
    for path in paths:
        if limit > 0:
            targets = shard_tokens(path) - 1
            found.append((path, limit if limit < targets else None))
            limit -= targets
    if limit > 0:
        raise DataError(f"{paths[0].parent} has {limit:,} tokens fewer to validate on than requested")
    return found


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 of names, sizes and first bytes of shards: enough to detect that a run resumes on other data."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES + 4096)
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + head)
    return digest.hexdigest()


@dataclass(frozen=True)
class Documents:
    """Tokens of many documents, and where each starts. loss_mask: which tokens carry loss as targets; None is
    all. stops: where each ends; None is where the next one starts. The last token is only a target.
    """

    tokens: np.ndarray
    starts: np.ndarray
    loss_mask: np.ndarray | None = None
    stops: np.ndarray | None = None

    @property
    def ends(self) -> np.ndarray:
        return np.append(self.starts[1:], len(self.tokens) - 1) if self.stops is None else self.stops


def shard_documents(path: Path, vocab_size: int, bos: int, limit: int | None = None) -> Documents:
    """The documents of a shard, or of its first `limit` targets."""
    return documents_in(read_shard(path, vocab_size), bos, limit)


def documents_in(tokens: np.ndarray, bos: int, limit: int | None = None) -> Documents:
    """Split tokens into documents, which start with `bos`. Tokens before the first `bos` are one too.

    limit: use only the first `limit` targets.
    """
    tokens = tokens[: limit + 1 if limit else None]
    starts = np.flatnonzero(tokens == bos)
    if not len(starts) or starts[0]:
        starts = np.insert(starts, 0, 0)
    return Documents(tokens, starts)

"""Token shards, packing of documents into rows, and batches as a pure function of the step.

A shard is llm.c's and modded-nanogpt's .bin: 256 int32 (magic, version, count), then the tokens as uint16
(version 1) or uint32 (version 2), each document opened by the beginning-of-document token.
"""
# B rows of a batch, T tokens of a row

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.errors import DataError

if TYPE_CHECKING:  # benchmarks read shards where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

MAGIC = 20240520
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
CHARACTERS_AT_ONCE = 1 << 21  # of the documents in a batch that is encoded
TOKEN_TYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by version


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write tokens as a shard, whole or not at all."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, version(vocab_size), len(tokens)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(TOKEN_TYPES[version(vocab_size)], copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def version(vocab_size: int) -> int:
    """Of the shard format, the one with the smallest type that holds the ids."""
    return 1 if vocab_size <= 1 << 16 else 2


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a shard, mapped from the file; DataError where it is damaged or for a larger
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
    """Encode documents into shards split_000000.bin, ... of at most 100M tokens or one document; returns the
    tokens.
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
    """Each document's tokens, opened by the beginning-of-document one, as shards hold them. The tokenizer's
    threads encode a batch of documents at once.
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
    """The shards of a split in a folder, in order; llm.c's and modded-nanogpt's names for it count too."""
    also = {"train": "train", "validation": "val"}[split]
    found = sorted({*folder.glob(f"{split}_*.bin"), *folder.glob(f"*_{also}_*.bin")})
    if not found:
        raise FileNotFoundError(f"no shards {split}_*.bin in {folder}; make some with `hotlap data`")
    return found


def first_shards(paths: list[Path], limit: int) -> list[tuple[Path, int | None]]:
    """The first shards that hold `limit` targets, and how many of each count: None is all; limit 0 is all."""
    if not limit:
        return [(path, None) for path in paths]
    found = []
    for path in paths:
        if limit > 0:
            targets = int(np.fromfile(path, "<i4", 3)[2]) - 1
            found.append((path, limit if limit < targets else None))
            limit -= targets
    if limit > 0:
        raise DataError(f"{paths[0].parent} has {limit:,} tokens fewer to validate on than are asked for")
    return found


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over names, sizes and headers of shards: enough to see that a run goes on with other data."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES + 4096)
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + head)
    return digest.hexdigest()


@dataclass(frozen=True)
class Documents:
    """Tokens of many documents end to end, and where each starts. said: which of them carry loss; None is
    all.
    """

    tokens: np.ndarray
    starts: np.ndarray
    said: np.ndarray | None = None


def shard_documents(path: Path, vocab_size: int, bos: int, limit: int | None = None) -> Documents:
    """The documents of a shard: each opens with `bos`; what lies before the first one counts as one too.

    limit: leave what comes after so many targets.
    """
    tokens = read_shard(path, vocab_size)[: limit + 1 if limit else None]
    starts = np.flatnonzero(tokens == bos)
    if not len(starts) or starts[0]:
        starts = np.insert(starts, 0, 0)
    return Documents(tokens, starts)


def cut(documents: Documents, T: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces of at most T tokens. Long documents are first cut after `shift` tokens."""
    ends = np.append(documents.starts[1:], len(documents.tokens) - 1)  # the last token is a target only
    long = ends - documents.starts > T
    starts, stops = [documents.starts[~long]], [ends[~long]]
    for start, end in zip(documents.starts[long], ends[long], strict=True):
        cuts = np.arange(start + shift, end, T)
        starts.append(np.insert(cuts, 0, start))
        stops.append(np.append(cuts, end))
    start = np.concatenate(starts)
    length = np.concatenate(stops) - start
    return start[length > 0], length[length > 0]


def pack(lengths: np.ndarray, T: int) -> list[list[int]]:
    """Best-fit decreasing: rows of piece indices whose lengths sum to at most T.

    Each piece, longest first, goes where it leaves the least space. Nothing is cut and nothing dropped; on
    text, whose documents are of all lengths, one or two tokens in a hundred of the rows stay empty.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(T + 1)]  # rows by the space that they have left
    spaces: list[int] = []  # those that have rows, sorted
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        fit = bisect.bisect_left(spaces, length)
        if fit == len(spaces):
            row, space = len(rows), T
            rows.append([])
        else:
            space = spaces[fit]
            row = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(fit)
        rows[row].append(int(piece))
        if left := space - length:
            if not with_space[left]:
                bisect.insort(spaces, left)
            with_space[left].append(row)
    return rows


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents. All (B, T) int64; target -1 carries no loss."""

    inputs: Tensor
    targets: Tensor
    document_start: Tensor

    @property
    def weight(self) -> int:
        """Number of targets."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        tensors = (self.inputs, self.targets, self.document_start)
        return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in tensors))


class PackedRows:
    """An endless sequence of rows over shards: row i is always the same, whoever asks, on any number of
    ranks.

    Every epoch goes through every shard, in an order of its own, and each token is a target once an epoch.
    """

    def __init__(self, shards: list[Callable[[], Documents]], T: int, seed: int, shuffle: bool = True):
        if not shards:
            raise ValueError("no shards to read; make some with `hotlap data`")
        self.shards, self.T, self.seed, self.shuffle = shards, T, seed, shuffle
        self._counts: dict[tuple[int, int], int] = {}
        self._current: tuple[tuple[int, int], Documents, np.ndarray, np.ndarray, list] | None = None

    def _packed(self, epoch: int, position: int):
        """Documents, piece starts, piece lengths and rows of the shard that is `position`-th in the epoch."""
        key = (epoch, position)
        if self._current is None or self._current[0] != key:
            random = np.random.default_rng((self.seed, epoch, position))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
            documents = self.shards[order[position] if self.shuffle else position]()
            shift = int(random.integers(1, self.T + 1)) if self.shuffle and epoch else self.T
            start, length = cut(documents, self.T, shift)
            rows = pack(length, self.T)
            if not rows:
                raise DataError("a shard has no token to predict; it needs at least two")
            if self.shuffle:
                random.shuffle(rows)
            self._counts[key] = len(rows)
            self._current = key, documents, start, length, rows
        return self._current[1:]

    def count(self, epoch: int, position: int) -> int:
        if (epoch, position) not in self._counts:
            self._packed(epoch, position)
        return self._counts[epoch, position]

    def epoch_rows(self, epoch: int = 0) -> int:
        return sum(self.count(epoch, position) for position in range(len(self.shards)))

    def batch(self, first: int, count: int) -> Batch:
        """Rows first to first + count - 1 of the endless sequence."""
        inputs = np.zeros((count, self.T), np.int64)
        targets = np.full((count, self.T), IGNORE, np.int64)
        document_start = np.zeros((count, self.T), np.int64)
        epoch = position = 0
        for b in range(count):
            while first >= (rows := self.count(epoch, position)):
                first -= rows
                epoch, position = divmod(epoch * len(self.shards) + position + 1, len(self.shards))
            documents, start, length, packed = self._packed(epoch, position)
            t = 0
            for piece in packed[first]:
                s, n = start[piece], length[piece]
                inputs[b, t : t + n] = documents.tokens[s : s + n]
                targets[b, t : t + n] = documents.tokens[s + 1 : s + n + 1]
                if documents.said is not None:
                    targets[b, t : t + n][~documents.said[s + 1 : s + n + 1]] = IGNORE
                document_start[b, t : t + n] = t
                t += n
            document_start[b, t:] = t  # padding is a document of its own
            first += 1
        return Batch(*map(torch.from_numpy, (inputs, targets, document_start)))


def check_rows(batch_rows: int, micro_rows: int, world: int = 1) -> None:
    """ValueError, listing what would do, where a step's rows do not divide into ranks and micro-batches."""
    if batch_rows % (micro_rows * world):
        valid = [str(n) for n in range(1, batch_rows + 1) if batch_rows % (n * world) == 0]
        raise ValueError(
            f"a batch of {batch_rows} rows is not a multiple of {world} ranks x {micro_rows} rows; "
            f"micro_batch may be {', '.join(valid) or f'nothing: make batch_rows a multiple of {world}'}"
        )


def step_batches(
    rows: PackedRows,
    *,
    batch_rows: int,
    micro_rows: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    share: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[list[Batch]]:
    """For each step from `start` on, this rank's micro-batches. All ranks together see the `share(step)` of
    batch_rows that come after those of the steps before, whatever the number of ranks."""
    first = sum(round(batch_rows * share(step)) for step in range(start))
    for step in itertools.count(start):
        count = round(batch_rows * share(step))
        check_rows(count, micro_rows, world)
        mine = range(first + rank * micro_rows, first + count, micro_rows * world)
        yield [rows.batch(row, micro_rows) for row in mine]
        first += count


def validation_batches(
    rows: PackedRows, B: int, limit: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's part of the first epoch of rows, once, in batches of B. Every rank has as many, filled up
    with rows without loss.
    """
    total = min(rows.epoch_rows(), limit or rows.epoch_rows())
    for start in range(0, total, B * world):
        first = start + rank * B
        batch = rows.batch(first, B)
        batch.targets[max(0, total - first) :] = IGNORE
        yield batch


def prefetch(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made ahead of time by a thread. An error there is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()

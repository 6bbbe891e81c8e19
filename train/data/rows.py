"""Packing documents into rows, and batches as a pure function of the step."""
# B rows of a batch, T tokens of a row

from __future__ import annotations

import bisect
import dataclasses
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.train.data.shards import Documents, first_shards, shard_documents, shard_paths

if TYPE_CHECKING:
    from hotlap.model.tokenizer import Tokenizer
    from hotlap.train.data.preference_rows import PairRows

LISTED = 1000  # rows of the largest micro-batch that an error suggests


def cut(documents: Documents, T: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces of at most T tokens. The first cut of a long document is at `shift`."""
    ends = documents.ends
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
    """Best-fit decreasing bin packing: rows of piece indices whose lengths sum to at most T.

    Each piece, longest first, goes into the fullest row that has space. Nothing is cut or dropped; on text
    with documents of all lengths, 1-2 % of the rows is padding.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = defaultdict(list)  # rows by the space left; T may be huge
    spaces: list[int] = []  # sorted sizes for which with_space has rows
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
    """Rows of packed documents. Tensors are (B, T) int64; target -1 has no loss.

    weight: the batch's contribution to the number that the step's loss is divided by; here, its number of
    targets. A stage that needs more data derives a class with further tensors of B rows.
    """

    inputs: Tensor
    targets: Tensor
    document_start: Tensor
    weight: float

    def change(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with `function` applied to each tensor."""
        tensors = {n: function(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copied asynchronously if it is pinned, as for CUDA."""
        if device.type == "cpu":
            return self
        return self.change(lambda t: t.to(device, non_blocking=device.type == "cuda"))

    def about(self) -> str:
        """What else identifies the batch in an error, beside the hash of its ids and its weight."""
        return ""

    def repeated(self, times: int) -> Batch:
        """Its rows repeated, for measuring the memory of larger batches."""
        tall = self.change(lambda t: t.repeat(times, *[1] * (t.ndim - 1)))
        return dataclasses.replace(tall, weight=times * self.weight)


def prefetched(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same batches, prefetched by a thread, and pinned if the device is a GPU."""
    return prefetch(pinned(steps, device) if device.type == "cuda" else steps)


def pinned(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same batches in pinned memory, for one thread."""
    torch.cuda.set_device(device)  # a new thread starts on GPU 0, whichever GPU the process has
    for micro in steps:
        yield [batch.change(Tensor.pin_memory) for batch in micro]


class PackedRows:
    """An endless sequence of rows over shards. Row i is the same on every rank and for any number of ranks.

    Each epoch visits every shard, in its own order, and each token is a target once per epoch.
    """

    def __init__(self, shards: list[Callable[[], Documents]], T: int, seed: int, shuffle: bool = True):
        if not shards:
            raise ValueError("no shards to read; create them with `hotlap data`")
        self.shards, self.T, self.seed, self.shuffle = shards, T, seed, shuffle
        self.row_tokens = T
        self._counts: dict[tuple[int, int], int] = {}
        self._current: tuple[tuple[int, int], Documents, np.ndarray, np.ndarray, list] | None = None

    def _packed(self, epoch: int, position: int):
        """Documents, piece starts, piece lengths and rows of the epoch's `position`-th shard."""
        key = (epoch, position)
        if self._current is None or self._current[0] != key:
            random = np.random.default_rng((self.seed, epoch, position))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
            documents = self.shards[order[position] if self.shuffle else position]()
            shift = int(random.integers(1, self.T + 1)) if self.shuffle and epoch else self.T
            start, length = cut(documents, self.T, shift)
            rows = pack(length, self.T)
            if not rows:
                raise DataError("a shard has no token to predict; it needs at least two tokens")
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
        """Rows `first` to `first + count - 1` of the endless sequence."""
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
                if documents.loss_mask is not None:
                    targets[b, t : t + n][~documents.loss_mask[s + 1 : s + n + 1]] = IGNORE
                document_start[b, t : t + n] = t
                t += n
            document_start[b, t:] = t  # padding is a document of its own
            first += 1
        tensors = map(torch.from_numpy, (inputs, targets, document_start))
        return Batch(*tensors, weight=int((targets != IGNORE).sum()))


def packed_rows(
    folder: Path, split: str, tokenizer: Tokenizer, T: int, seed: int = 0, limit: int = 0
) -> PackedRows:
    """Rows of a split, or of its first `limit` tokens; training rows are shuffled."""
    shards = [
        partial(shard_documents, path, tokenizer.vocab_size, tokenizer.bos, count)
        for path, count in first_shards(shard_paths(folder, split), limit)
    ]
    return PackedRows(shards, T, seed, shuffle=split == "train")


def check_rows(batch_rows: int, micro_rows: int, world: int = 1) -> None:
    """Raise ValueError, listing valid values, if a step's rows do not divide into ranks x micro-batches."""
    if batch_rows % (micro_rows * world):
        some = range(1, min(batch_rows, LISTED) + 1)
        valid = [str(n) for n in some if batch_rows % (n * world) == 0]
        raise ValueError(
            f"a batch of {batch_rows} rows is not a multiple of {world} ranks x {micro_rows} rows; "
            + (
                f"micro_batch may be {', '.join(valid)}"
                if valid
                else f"make batch_rows a multiple of {world}"
            )
        )


def step_batches(
    rows: PackedRows | PairRows,
    *,
    batch_rows: int,
    micro_rows: int,
    start: int = 0,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    share: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step from `start` on.

    A step takes the next share(step) * batch_rows rows of the sequence, for any number of ranks. first: the
    rows that the steps before took, perhaps of another number.
    """
    for step in itertools.count(start):
        count = round(batch_rows * share(step))
        check_rows(count, micro_rows, world)
        mine = range(first + rank * micro_rows, first + count, micro_rows * world)
        yield [rows.batch(row, micro_rows) for row in mine]
        first += count


def validation_batches(rows: PackedRows, B: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This rank's part of the first epoch, in batches of B. All ranks have the same number of batches; rows
    beyond the epoch have no loss.
    """
    total = rows.epoch_rows()
    for start in range(0, total, B * world):
        first = start + rank * B
        batch = rows.batch(first, B)
        batch.targets[max(0, total - first) :] = IGNORE
        yield batch


def prefetch(items: Iterable, depth: int = 2) -> Iterator:
    """The same items, produced ahead of time by a thread, whose errors are raised here."""
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

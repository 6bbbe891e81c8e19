"""Preference pairs as tokens, packed into rows of two sides: the chosen answers, and the rejected ones of the
same pairs.
"""
# B rows of a batch, T tokens of a side, P pairs of the fullest row, N pairs

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.conversation import render
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.data.conversation_rows import held_out, shortest
from hotlap.train.data.left_out import LeftOut
from hotlap.train.data.preferences import SIDES, Pair
from hotlap.train.data.rows import Batch, pack
from hotlap.train.data.shards import TOKEN_TYPES, version
from hotlap.train.data.sources import SPLITS

NAMED = 8  # pairs of a batch that an error names


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs. inputs, targets and document_start are (B, 2, T): side 0 has the chosen answers, each
    after its prompt, side 1 the rejected ones. weight: the number of pairs.
    """

    pair: Tensor
    """(B, 2, T) int64: the place of a token's pair in its row, from 0; -1 for padding."""
    reference: Tensor
    """(B, 2, T) float32: the reference's log-probability of each target, in nats; 0 where there is none."""
    numbers: Tensor
    """(B, P) int64: the pairs of each row, by their number in the data; -1 where it has fewer."""

    def about(self) -> str:
        numbers = [number + 1 for number in self.numbers.flatten().tolist() if number >= 0]
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        return f" of pairs {', '.join(map(str, numbers[:NAMED]))}{more}"


class Place(NamedTuple):
    """Where a document of `length` inputs, which begins at `start` of the tokens, is in a row."""

    pair: int
    number: int
    side: int
    at: int
    start: int
    length: int


class PairTokens:
    """Pairs as tokens: 7 bytes a token. `reference` is filled before training."""

    def __init__(self, vocab_size: int):
        self.dtype = TOKEN_TYPES[version(vocab_size)]
        self._ids, self._loss_mask, self._stops = array(self.dtype.char), bytearray(), array("q")
        self._draws, self._splits = array("d"), array("b")  # splits: -1 where the text decides
        self.places: list[str] = []

    def add(self, pair: Pair, sides: list[tuple[list[int], list[bool]]]) -> None:
        """sides: ids and loss mask of the chosen and of the rejected conversation."""
        for ids, loss_mask in sides:
            self._ids.extend(ids)
            self._loss_mask.extend(loss_mask)
            self._stops.append(len(self._ids))
        self._draws.append(random.Random(json.dumps(pair.prompt, sort_keys=True)).random())
        self._splits.append(SPLITS.index(pair.split) if pair.split else -1)
        self.places.append(pair.place)

    def finish(self) -> PairTokens:
        self.ids = np.frombuffer(self._ids, self.dtype)  # all ids
        self.loss_mask = np.frombuffer(self._loss_mask, bool)
        self.stops = np.frombuffer(self._stops, np.int64).reshape(-1, 2)  # (N, 2)
        self.starts = np.append(0, self.stops.flatten()[:-1]).reshape(-1, 2)
        self.reference = np.zeros(len(self.ids), np.float32)
        return self

    def splits(self) -> dict[str, np.ndarray]:
        """The numbers of each split's pairs. Pairs of one prompt share a split. A single one is in both."""
        splits = np.array(self._splits)
        if (open := splits < 0).any():
            found = np.frombuffer(self._draws)[open], (self.stops - self.starts).sum(1)[open]
            splits[open] = held_out(*found)
            if not (splits == SPLITS.index("validation")).any():
                splits[open] = shortest(*found)
        return {
            split: np.flatnonzero(splits == number if (splits == number).any() else splits >= 0)
            for number, split in enumerate(SPLITS)
        }


class PairRows:
    """An endless sequence of rows of pairs. Row i is the same on every rank and for any number of ranks.

    Each epoch has the same rows, in its own order: what is packed together stays together.
    """

    def __init__(self, tokens: PairTokens, numbers: np.ndarray, T: int, seed: int, shuffle: bool):
        self.tokens, self.numbers, self.T, self.seed, self.shuffle = tokens, numbers, T, seed, shuffle
        self.row_tokens = 2 * T
        longest = (tokens.stops - tokens.starts)[numbers].max(1) - 1  # the last id is only a target
        self.packed = [numbers[row] for row in pack(longest, T)]
        self.most = max(map(len, self.packed))
        self._order: tuple[int, np.ndarray] | None = None

    def epoch_rows(self) -> int:
        return len(self.packed)

    def row(self, index: int) -> np.ndarray:
        """The numbers of the pairs in row `index` of the endless sequence."""
        epoch, place = divmod(index, len(self.packed))
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.packed))
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._order = epoch, order
        return self.packed[self._order[1][place]]

    def placed(self, index: int) -> Iterator[Place]:
        """Where everything is in a row. A pair begins at the same token on both sides."""
        at = 0
        for pair, number in enumerate(self.row(index)):
            starts, stops = self.tokens.starts[number], self.tokens.stops[number]
            for side in range(2):
                yield Place(pair, number, side, at, starts[side], stops[side] - starts[side] - 1)
            at += max(stops - starts) - 1

    def batch(self, first: int, count: int) -> PairBatch:
        """Rows `first` to `first + count - 1` of the endless sequence."""
        shape = count, 2, self.T
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        document_start = np.broadcast_to(np.arange(self.T), shape).copy()  # padding sees only itself
        pair, reference = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        numbers = np.full((count, self.most), -1, np.int64)
        for b in range(count):
            for place in self.placed(first + b):
                here = b, place.side, slice(place.at, place.at + place.length)
                answer = slice(place.start + 1, place.start + place.length + 1)
                inputs[here] = self.tokens.ids[place.start : place.start + place.length]
                targets[here] = self.tokens.ids[answer]
                targets[here][~self.tokens.loss_mask[answer]] = IGNORE
                document_start[here], pair[here] = place.at, place.pair
                reference[here] = self.tokens.reference[answer]
                numbers[b, place.pair] = place.number
        tensors = map(torch.from_numpy, (inputs, targets, document_start))
        others = map(torch.from_numpy, (pair, reference, numbers))
        return PairBatch(*tensors, int((numbers >= 0).sum()), *others)

    def keep_reference(self, first: int, values: np.ndarray) -> None:
        """Keep log-probabilities (B, 2, T) of the rows from `first` on, of the first epoch, as the
        reference.
        """
        for b in range(min(len(values), self.epoch_rows() - first)):
            for place in self.placed(first + b):
                found = values[b, place.side, place.at : place.at + place.length]
                self.tokens.reference[place.start + 1 : place.start + place.length + 1] = found


def pair_rows(
    pairs: Iterable[Pair], tokenizer: Tokenizer, T: int, seed: int
) -> tuple[PairTokens, dict[str, PairRows]]:
    """The pairs as tokens, and the rows of each split. Training rows are shuffled.

    Pairs are left out, and counted in the log, if a side is longer than the context of T tokens (nothing is
    cut), if both answers are the same, or if the tokenizer lacks a character.
    """
    kept, left_out = PairTokens(tokenizer.vocab_size), LeftOut("pairs")
    for pair in pairs:
        reason = ""
        if pair.chosen == pair.rejected:
            reason = "have the same answer twice"
        else:
            try:
                sides = [rendered_side(pair.prompt, getattr(pair, side), tokenizer) for side in SIDES]
                if max(len(ids) for ids, _ in sides) > T:
                    reason = f"are longer than the model's context of {T} tokens"
            except DataError:
                reason = "have characters that the model's tokenizer lacks"
        if reason:
            left_out.add(reason, pair.place)
        else:
            kept.add(pair, sides)
    reasons = left_out.reasons(len(kept.places))
    if not kept.places:
        reason = "; ".join(reasons) or "the data have none"
        raise DataError(f"no pair can be learned from: {reason}; change them, or take another --base")
    for reason in reasons:
        log.info("left out: %s", reason)
    kept.finish()
    return kept, {
        split: PairRows(kept, numbers, T, seed, shuffle=split == "train")
        for split, numbers in kept.splits().items()
    }


def rendered_side(
    prompt: list[dict], answer: list[dict], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of a prompt and an answer. Only what the assistant says in the latter has loss."""
    before = len(render(prompt, tokenizer)[0])
    ids, loss_mask = render([*prompt, *answer], tokenizer)
    return ids, [False] * before + loss_mask[before:]


def pair_digests(tokens: PairTokens, numbers: np.ndarray) -> list[bytes]:
    """16 bytes of the sha256 of each pair's tokens: to find duplicates and to recognise the data."""
    bounds = ((*tokens.starts[number], *tokens.stops[number]) for number in numbers)
    return [
        hashlib.sha256(tokens.ids[a:b].tobytes() + b"/" + tokens.ids[c:d].tobytes()).digest()[:16]
        for a, c, b, d in bounds
    ]

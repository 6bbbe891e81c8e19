"""The conversations of a mixture, split and packed into rows.

They are read once, and kept as tokens: about 1.3 GB of nanochat's mixture on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from hotlap.train.data.conversation_tokens import Tokens, rendered
from hotlap.train.data.conversations import Conversation
from hotlap.train.data.left_out import LeftOut
from hotlap.train.data.mixtures import Part
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.shards import Documents
from hotlap.train.data.sources import SPLITS

VALIDATION_SHARE, LARGEST_SHARE = 0.05, 0.1  # of the conversations, and of their text at most
TRAIN, VALIDATION = range(len(SPLITS))


def conversation_rows(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, T: int, seed: int, parts: Sequence[Part]
) -> dict[str, PackedRows]:
    """The rows of T tokens of each split, in which only the assistant's tokens carry loss. Training rows are
    shuffled. parts: what the conversations are of.

    Conversations that are longer than a row, or have characters that the tokenizer lacks, are left out, and
    their number is logged. Text that spells a special token stays text.
    """
    kept, left_out = Tokens(tokenizer.vocab_size, parts, seed), LeftOut("conversations")
    spelled_special = 0
    for conversation, ids, loss_mask in rendered(conversations, tokenizer, T, left_out):
        kept.add(conversation, ids, loss_mask)
        texts = (message["content"] for message in conversation.messages)
        spelled_special += any(token in text for text in texts for token in SPECIAL_TOKENS)
    reasons = left_out.reasons(len(kept.stops))
    if not kept.stops:
        raise DataError(
            f"no conversation fits the model: {'; '.join(reasons)}; shorten or change them, or take another "
            "--base"
        )
    for reason in reasons:
        log.info("left out: %s", reason)
    if spelled_special:
        log.info("%d conversations contain the text of a special token; it stays text", spelled_special)
    return {
        split: PackedRows([lambda documents=documents: documents], T, seed, shuffle=split == "train")
        for split, documents in documents_by_split(kept).items()
    }


def documents_by_split(kept: Tokens) -> dict[str, Documents]:
    """The conversations of each split: each one that validates once, and the others as often as their parts'
    weights say. How much each part has of both is logged.

    Copies of a conversation that validates do not train, whichever parts they are of. A single conversation,
    or copies of it, is both splits.
    """
    kept.ids.append(0)  # only a target
    kept.loss_mask.append(False)
    tokens, loss_mask = np.frombuffer(kept.ids, kept.dtype), np.frombuffer(kept.loss_mask, bool)
    stops = np.frombuffer(kept.stops, np.int64)
    starts = np.append(0, stops[:-1])
    part = np.frombuffer(kept.part, np.int32)
    splits = splits_of(np.frombuffer(kept.draws), np.array(kept.splits), stops - starts, part)
    train, validation = (
        np.flatnonzero(splits == split if (splits == split).any() else splits >= 0)
        for split in (TRAIN, VALIDATION)
    )
    copies = np.frombuffer(kept.copies, np.int16)[train]
    # pass by pass, so that copies, which are equally long, are seldom packed into the same row
    train = np.concatenate([train[copies > done] for done in range(max(1, copies.max()))])
    if not len(train):
        raise DataError(f"the weights take none of {len(copies)} conversations; raise {listed(kept.parts)}")
    for number, named in enumerate(kept.parts):
        mine = train[part[train] == number]
        size = (stops - starts)[mine].sum()
        log.info(
            "%s: %s conversations, %s tokens an epoch (%.0f %%); %s validate",
            named, f"{len(np.unique(mine)):,}", f"{size:,}", 100 * size / (stops - starts)[train].sum(),
            f"{(part[validation] == number).sum():,}",
        )  # fmt: skip
    return {
        name: Documents(tokens, starts[chosen], loss_mask, stops[chosen])
        for name, chosen in zip(SPLITS, (train, validation), strict=True)
    }


def listed(parts: Sequence[Part]) -> str:
    return " ".join(map(str, parts))


def splits_of(draws: np.ndarray, splits: np.ndarray, sizes: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The split of each conversation, and -1 for those that are left out: copies, in data that is to train,
    of a conversation that validates. splits: the data sets' own, or -1.

    Each part is split for itself, so that a small one has not all it has held out. Only if no conversation of
    any part validates, the shortest does.
    """
    opened, splits = splits < 0, splits.copy()
    for number in np.unique(part[opened]):
        mine = opened & (part == number)
        splits[mine] = held_out(draws[mine], sizes[mine])
    if opened.any() and not (splits == VALIDATION).any():
        splits[opened] = shortest(draws[opened], sizes[opened])
    leaked = (splits == TRAIN) & np.isin(draws, draws[splits == VALIDATION])
    if leaked.any() and (splits[~leaked] == TRAIN).any():
        splits[leaked] = -1
        log.info("left out: %d copies of conversations that validate", leaked.sum())
    return splits


def held_out(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which conversations validate, bool (count,).

    draws: uniform in [0, 1), and a function of the text, so that equal conversations share a split. sizes: in
    tokens. About 1 in 20 validates. Of these, the longest do not if together they are more than a tenth of
    the text.
    """
    values, group = np.unique(draws, return_inverse=True)
    size = np.bincount(group, sizes)  # of all copies
    shortest_first = np.argsort(size, kind="stable")
    drawn = shortest_first[values[shortest_first] < VALIDATION_SHARE]
    drawn = drawn[np.cumsum(size[drawn]) <= LARGEST_SHARE * size.sum()]
    return np.isin(group, drawn)


def shortest(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which conversations are the shortest one and its copies, bool (count,)."""
    _, group = np.unique(draws, return_inverse=True)
    return group == np.bincount(group, sizes).argmin()


def conversation_digests(rows: PackedRows) -> list[bytes]:
    """16 bytes of the sha256 of each conversation's tokens: to find duplicates and to recognise the data."""
    (documents,) = (shard() for shard in rows.shards)
    return [
        hashlib.sha256(documents.tokens[start:end]).digest()[:16]
        for start, end in zip(documents.starts, documents.ends, strict=True)
    ]

"""Which documents train and which validate.

The hash of its text decides about a document: about 1 in 20 validates, and equal ones are on the same side.
Where that would leave validation without text, or with much of it, the amount of text decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from hotlap.common.errors import DataError
from hotlap.common.log import log_once

SPLITS = ("train", "validation")
LEAST, MOST = 0.01, 0.1  # of the text validates, where the amount of text decides
HELD_BACK = 1 << 24  # characters, until which the split of the first documents may stay open


def labelled(documents: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Each document, or a part of it, with its split. Documents without text are left out and counted.

    The first ones are held back until the hash has chosen LEAST to MOST of their text to validate. Then the
    hash decides, except about a document that is too long beside those before it: its end validates.
    """
    documents = with_text(documents, name)
    first, fair = first_documents(documents)
    if not first:
        raise DataError(f"{name!r} holds no text; name files with text in them, or pydocs")
    shares = (
        {} if fair else held_out(first, name)
    )  # of a document that trains, by digest; else the hash decides
    total = sum(map(len, first))
    for text in chain(first, documents):
        key = digest(text)
        if key not in shares and len(text) > total * (MOST if validates(key) else 1 / MOST):
            shares[key] = 1 - MOST  # rare: the text grows by a tenth at least
        cut = int(len(text) * shares.get(key, 0.0 if validates(key) else 1.0))
        if cut:
            yield "train", text[:cut]
        if cut < len(text):
            yield "validation", text[cut:]
        total += len(text)


def with_text(documents: Iterable[str], name: str) -> Iterator[str]:
    blank = 0
    for text in documents:
        if text and not text.isspace():
            yield text
        else:
            blank += 1
    if blank:
        log_once(f"{name}: left out {blank} documents or files without text")


def first_documents(documents: Iterator[str]) -> tuple[list[str], bool]:
    """The first documents, and whether their hashes choose a fair amount of text to validate."""
    first, total, held = [], 0, 0
    for text in documents:
        first.append(text)
        total += len(text)
        held += len(text) * validates(digest(text))
        if LEAST * total <= held <= MOST * total:
            return first, True
        if total > HELD_BACK:
            break
    return first, False


def held_out(documents: list[str], name: str) -> dict[bytes, float]:
    """The share that trains, by digest, of documents about which the hash does not decide.

    The longest document that has (with its copies) LEAST to MOST of the text validates; if there is none, the
    end of the longest document does, as in nanoGPT.
    """
    amounts: Counter[bytes] = Counter()
    for text in documents:
        amounts[digest(text)] += len(text)
    total = amounts.total()
    shares = {key: 1.0 for key in amounts if validates(key)}
    if whole := [key for key, amount in amounts.items() if LEAST * total <= amount <= MOST * total]:
        shares[max(whole, key=amounts.__getitem__)] = 0.0
    else:
        shares[digest(max(documents, key=len))] = 1 - MOST
    if len(documents) > 1:
        what = "one of them validates" if whole else f"the last {MOST:.0%} of the longest validate"
        log_once(f"{name}: few documents, so {what}")
    return shares


def split_text(text: str) -> tuple[str, str]:
    """A single text as nanoGPT splits it: the first 90 % trains, the rest validates."""
    cut = int(len(text) * (1 - MOST))
    return text[:cut], text[cut:]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def validates(digest: bytes) -> bool:
    """About 1 in 20."""
    return digest[0] < 256 // 20

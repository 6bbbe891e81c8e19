"""The corpora of the race, and what identifies their text: hashes that do not depend on a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hotlap.common.files import file_sha256
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.data.shards import encoded, first_shards, read_shard, shard_paths
from hotlap.train.data.sources import TEXTS, documents_of

CLIMBMIX = "climbmix"
CORPORA = (CLIMBMIX, *TEXTS)


def text_sha256(documents: Iterable[bytes]) -> str:
    """A hash of documents and their order, each in UTF-8."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document).digest())
    return digest.hexdigest()


def corpus_text(corpus: str, split: str) -> Iterator[bytes]:
    """The documents of a split of a corpus in TEXTS, as it is on this machine."""
    return (document.encode() for document in documents_of(split, corpus))


def shard_text(folder: Path, split: str, tokenizer: Tokenizer, limit: int = 0) -> Iterator[bytes]:
    """The documents in token shards. limit: only the first `limit` targets, as validation reads them."""
    for path, most in first_shards(shard_paths(folder, split), limit):
        tokens = read_shard(path, tokenizer.vocab_size)[: most + 1 if most else None]
        for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.bos)):
            if len(ids):
                yield spelled(ids, tokenizer)


def spelled(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids.tolist()))


def training_sha256(corpus: str, folder: Path, tokenizer: Tokenizer) -> str:
    """A hash of the training text in a folder of shards; of ClimbMix's shards themselves, which are large."""
    if corpus in TEXTS:
        return text_sha256(shard_text(folder, "train", tokenizer))
    return text_sha256(file_sha256(path).encode() for path in shard_paths(folder, "train"))


def loses_text(tokenizer: Tokenizer, documents: Iterable[bytes], sha256: str) -> bool:
    """Whether documents with this hash lose anything when they are tokenized: bits per byte would not count
    what the model is never asked.
    """
    texts = (document.decode() for document in documents)
    return text_sha256(spelled(ids, tokenizer) for ids in encoded(texts, tokenizer)) != sha256

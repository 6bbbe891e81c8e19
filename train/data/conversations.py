"""Conversations for fine-tuning, read from where a string says and packed into rows.

The string is `tasks` (the built-in ones), `smoltalk` (SmolTalk and the tasks but refusals), or the path of a
file.
Conversations are read once, and kept as tokens, three bytes each: about 1.2 GB of SmolTalk on every rank.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.model.conversation import render
from hotlap.model.messages import tool_expression
from hotlap.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from hotlap.train.data import hub
from hotlap.train.data.conversation_files import accepted, read_conversations
from hotlap.train.data.datasets import SMOLTALK
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.shards import CHARACTERS_AT_ONCE, TOKEN_TYPES, Documents, version
from hotlap.train.data.sources import SPLITS, split_documents
from hotlap.train.data.tasks import arithmetic, facts, identity, refusals, spelling
from hotlap.train.data.text_files import named_path

ARITHMETIC, SPELLING, IDENTITY = 4000, 6500, 8  # sums, words and repeats of each greeting in `tasks`
REFUSALS = 2500  # questions about anything else in `tasks`; none beside SmolTalk, which answers them
TURNS = (1, 1, 1, 2, 3)  # questions in a conversation, drawn uniformly
BUILT_IN = ("tasks", "smoltalk")
SMOLTALK_FILES = SMOLTALK.names(len(SMOLTALK.files["train"]))  # validation first
VALIDATION_SHARE, LARGEST_SHARE = 0.05, 0.1  # of the conversations, and of their text at most


class Conversation(NamedTuple):
    """place: file and line, or another name. split: the dataset's own; None: the text decides."""

    place: str
    messages: list[dict]
    split: str | None = None


def conversations_of(data: str, seed: int) -> Iterator[Conversation]:
    """The conversations that `data` names.

    SmolTalk has its own splits. The tasks follow, which teach the calculator. It must have been downloaded
    (`download_conversations`).
    """
    if data not in BUILT_IN:
        for place, messages in read_conversations(named_path(data)):
            yield Conversation(place, messages)
        return
    if Path(data).exists():
        log.info("%s: the built-in conversations, not the file of that name, which is ./%s", data, data)
    if data == "smoltalk":
        validation, *train = SMOLTALK_FILES
        for split, names in (("train", train), ("validation", [validation])):
            for name in names:
                for place, messages in accepted(smoltalk_folder() / name):
                    yield Conversation(place, messages, split)
    for number, messages in enumerate(documentation_tasks(seed, refuse=data == "tasks"), 1):
        yield Conversation(f"task {number}", messages)


def check_conversations(data: str) -> None:
    """Read a file of conversations to its end, so that its errors show before a long run."""
    if data not in BUILT_IN:
        for _ in read_conversations(named_path(data)):
            pass


def conversations_plan(data: str) -> hub.DownloadPlan | None:
    """What `download_conversations` will download; None if `data` is not on the hub. Asks it for sizes."""
    return hub.plan_download(SMOLTALK, smoltalk_folder(), SMOLTALK_FILES) if data == "smoltalk" else None


def download_conversations(data: str) -> None:
    """Download and check what `data` names, if it is on the hub and not in the cache yet."""
    if data == "smoltalk":
        hub.download(SMOLTALK, smoltalk_folder(), SMOLTALK_FILES)


def smoltalk_folder() -> Path:
    return cache_folder() / "smoltalk"


@cache  # shared by both splits
def documentation_tasks(seed: int, refuse: bool) -> list[list[dict]]:
    return built_in(split_documents("pydocs")[0], seed, refuse)


def built_in(texts: list[str], seed: int, refuse: bool) -> list[list[dict]]:
    """Facts, sums, spelling and greetings, shuffled; refuse: also refusals of everything else.

    texts: the words to spell are taken from them.
    """
    conversations = [
        *facts.training_conversations(),
        *arithmetic.training_conversations(ARITHMETIC, seed),
        *spelling.training_conversations(spelling.words(texts), SPELLING, seed),
        *identity.training_conversations(IDENTITY),
        *refusals.training_conversations(REFUSALS if refuse else 0, seed),
    ]
    generator = random.Random(seed)
    generator.shuffle(conversations)
    joined, i = [], 0
    while i < len(conversations):  # several turns, so that the model has seen a history
        turns = generator.choice(TURNS)
        joined.append([message for c in conversations[i : i + turns] for message in c])
        i += turns
    return joined


class EncodedTexts:
    """Acts as a tokenizer for known texts, which its threads have encoded all at once."""

    def __init__(self, conversations: list[list[dict]], tokenizer: Tokenizer):
        self.bos, self.special = tokenizer.bos, tokenizer.special
        texts = {message["content"] for messages in conversations for message in messages}
        texts |= {
            tool_expression(message)
            for messages in conversations
            for message in messages
            if message.get("tool_calls")
        }
        self.ids = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))

    def encode(self, text: str) -> list[int]:
        return self.ids[text]


class LeftOut:
    """Conversations that cannot be used, counted by reason."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, conversation: Conversation, detail: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{conversation.place}: {detail}")

    def reasons(self, kept: int) -> list[str]:
        total = kept + self.counts.total()
        return [
            f"{n:,} of {total:,} conversations {why} ({self.first[why]})" for why, n in self.counts.items()
        ]


def rendered(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, T: int, left_out: LeftOut
) -> Iterator[tuple[Conversation, list[int], list[bool]]]:
    """The conversations of at most T tokens, with their ids and loss mask; the others go to left_out. Some
    MB of text are encoded at once.
    """
    too_long = f"are longer than the model's context of {T} tokens"
    most = T * max(tokenizer.byte_counts())  # characters that could fit
    batch: list[Conversation] = []
    characters = 0

    def flush() -> Iterator[tuple[Conversation, list[int], list[bool]]]:
        texts = tokenizer
        if tokenizer.is_bpe:  # single characters gain nothing from threads, and may be missing
            texts = EncodedTexts([conversation.messages for conversation in batch], tokenizer)
        for conversation in batch:
            try:
                ids, loss_mask = render(conversation.messages, texts)
            except DataError as error:
                left_out.add("have characters that the model's tokenizer lacks", conversation, str(error))
                continue
            if len(ids) > T:
                left_out.add(too_long, conversation, f"{len(ids):,} tokens")
            else:
                yield conversation, ids, loss_mask

    for conversation in conversations:
        size = sum(len(message["content"]) for message in conversation.messages)
        if size > most:  # encoding it would take much memory
            left_out.add(too_long, conversation, f"{size:,} characters")
            continue
        batch.append(conversation)
        characters += size
        if characters > CHARACTERS_AT_ONCE:
            yield from flush()
            batch, characters = [], 0
    yield from flush()


class Tokens:
    """Conversations as tokens, in arrays that grow in place: 3 bytes a token, 17 a conversation."""

    def __init__(self, vocab_size: int):
        self.dtype = TOKEN_TYPES[version(vocab_size)]
        self.ids, self.loss_mask, self.stops = array(self.dtype.char), bytearray(), array("q")
        self.draws, self.splits = array("d"), array("b")  # splits: -1 where the text decides

    def add(self, conversation: Conversation, ids: list[int], loss_mask: list[bool]) -> None:
        self.ids.extend(ids)
        self.loss_mask.extend(loss_mask)
        self.stops.append(len(self.ids))
        text = json.dumps(conversation.messages, sort_keys=True)
        self.draws.append(random.Random(text).random())
        self.splits.append(SPLITS.index(conversation.split) if conversation.split else -1)

    def documents(self) -> dict[str, Documents]:
        """The conversations of each split. A single one, or copies of it, is both splits."""
        self.ids.append(0)  # only a target
        self.loss_mask.append(False)
        tokens, loss_mask = np.frombuffer(self.ids, self.dtype), np.frombuffer(self.loss_mask, bool)
        stops, splits = np.frombuffer(self.stops, np.int64), np.array(self.splits)
        starts = np.append(0, stops[:-1])
        if (open := splits < 0).any():
            splits[open] = held_out(np.frombuffer(self.draws)[open], (stops - starts)[open])
        found = {}
        for number, split in enumerate(SPLITS):
            chosen = splits == number if (splits == number).any() else splits >= 0
            found[split] = Documents(tokens, starts[chosen], loss_mask, stops[chosen])
        return found


def held_out(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which conversations validate, bool (count,).

    draws: uniform in [0, 1), and a function of the text, so that equal conversations share a split. sizes: in
    tokens. About 1 in 20 validates. Of these, the longest do not if together they are more than a tenth of
    the text. If none is left, the shortest of all conversations validates.
    """
    values, group = np.unique(draws, return_inverse=True)
    size = np.bincount(group, sizes)  # of all copies
    shortest_first = np.argsort(size, kind="stable")
    drawn = shortest_first[values[shortest_first] < VALIDATION_SHARE]
    drawn = drawn[np.cumsum(size[drawn]) <= LARGEST_SHARE * size.sum()]
    return np.isin(group, drawn if len(drawn) else shortest_first[:1])


def conversation_rows(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, T: int, seed: int
) -> dict[str, PackedRows]:
    """The rows of T tokens of each split, in which only the assistant's tokens carry loss. Training rows are
    shuffled.

    Conversations that are longer than a row, or have characters that the tokenizer lacks, are left out, and
    their number is logged. Text that spells a special token stays text.
    """
    kept, left_out = Tokens(tokenizer.vocab_size), LeftOut()
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
        for split, documents in kept.documents().items()
    }


def conversation_digests(rows: PackedRows) -> list[bytes]:
    """16 bytes of the sha256 of each conversation's tokens: to find duplicates and to recognise the data."""
    (documents,) = (shard() for shard in rows.shards)
    return [
        hashlib.sha256(documents.tokens[start:end]).digest()[:16]
        for start, end in zip(documents.starts, documents.ends, strict=True)
    ]

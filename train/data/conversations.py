"""Conversations for fine-tuning, read from where a string says and packed into rows.

The string is `tasks` (the built-in ones), `smoltalk` (SmolTalk and the tasks), or the path of a file.
Conversations are streamed and kept as tokens, three bytes each: about 1.2 GB of SmolTalk on every rank.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.model.conversation import check_messages, render, tool_expression
from hotlap.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from hotlap.train.data import hub
from hotlap.train.data.datasets import SMOLTALK
from hotlap.train.data.file_documents import parquet_column
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.shards import CHARACTERS_AT_ONCE, TOKEN_TYPES, Documents, version
from hotlap.train.data.sources import split_documents
from hotlap.train.data.tasks import arithmetic, facts, identity, spelling

ARITHMETIC, SPELLING, IDENTITY = 4000, 6000, 12  # sums, words and repeats of each greeting in `tasks`
TURNS = (1, 1, 1, 2, 3)  # questions in a conversation, drawn uniformly
SMOLTALK_FILES = SMOLTALK.names(len(SMOLTALK.numbers))  # validation first


def conversations_of(split: str, data: str, seed: int) -> Iterator[list[dict]]:
    """The training or validation conversations that `data` names.

    SmolTalk has its own splits, each followed by that of the tasks, which teach the calculator. It must have
    been downloaded (`download_conversations`).
    """
    if data == "smoltalk":
        validation, *train = SMOLTALK_FILES
        for name in train if split == "train" else [validation]:
            yield from accepted(smoltalk_folder() / name)
    if data in ("tasks", "smoltalk"):
        found: Iterable[list[dict]] = documentation_tasks(seed)
    else:
        found = read_conversations(Path(data))
    yield from (messages for label, messages in labelled_conversations(found) if label == split)


def check_conversations(data: str) -> None:
    """Read a file of conversations to its end, so that its errors show before a long run."""
    if data not in ("tasks", "smoltalk"):
        for _ in read_conversations(Path(data)):
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
def documentation_tasks(seed: int) -> list[list[dict]]:
    return built_in(split_documents("pydocs")[0], seed)


def built_in(texts: list[str], seed: int) -> list[list[dict]]:
    """Facts, sums, spelling and greetings, shuffled. texts: the words to spell are taken from them."""
    conversations = [
        *facts.training_conversations(),
        *arithmetic.training_conversations(ARITHMETIC, seed),
        *spelling.training_conversations(spelling.words(texts), SPELLING, seed),
        *identity.training_conversations(IDENTITY),
    ]
    generator = random.Random(seed)
    generator.shuffle(conversations)
    joined, i = [], 0
    while i < len(conversations):  # several turns, so that the model has seen a history
        turns = generator.choice(TURNS)
        joined.append([message for c in conversations[i : i + turns] for message in c])
        i += turns
    return joined


def labelled_conversations(conversations: Iterable[list[dict]]) -> Iterator[tuple[str, list[dict]]]:
    """Each conversation with its split: about 1 in 20 validates, and equal ones share a split. The first ones
    are held back until both splits have one.
    """
    waiting: list[tuple[str, list[dict]]] = []
    found = set()
    for messages in conversations:
        number = random.Random(json.dumps(messages, sort_keys=True)).random()
        split = "validation" if number < 0.05 else "train"
        found.add(split)
        waiting.append((split, messages))
        if len(found) == 2:
            yield from waiting
            waiting.clear()
    if waiting:  # too few to leave it to chance
        all_of_them = [messages for _, messages in waiting]
        yield from (("train", messages) for messages in all_of_them[1:] or all_of_them)
        yield "validation", all_of_them[0]


def read_conversations(path: Path) -> Iterator[list[dict]]:
    """The conversations of a .jsonl file, one {"messages": [...]} per line, or of the column `messages` of a
    .parquet file. DataError names the file and line or row of an invalid one.
    """
    empty = True
    for place, messages in records(path):
        try:
            yield checked(messages)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        empty = False
    if empty:
        raise DataError(f'{path} holds no conversation; each line or row must be {{"messages": [...]}}')


def accepted(path: Path) -> Iterator[list[dict]]:
    """The valid conversations of a public file. How many others are skipped is logged."""
    total, refused, first = 0, 0, ""
    for place, messages in records(path):
        total += 1
        try:
            yield checked(messages)
        except DataError as error:
            refused, first = refused + 1, first or f"{place}: {error}"
    if refused:
        log.info("%s: skipped %d of %d conversations, the first: %s", path.name, refused, total, first)


def checked(messages: object) -> list[dict]:
    """The conversation, if it is one to learn from; else DataError."""
    messages = check_messages(messages)
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise DataError("the conversation does not end with the assistant's answer")
    return messages


def records(path: Path) -> Iterator[tuple[str, object]]:
    """The unchecked `messages` of each line or row of a file, after their place: path:line or path:row."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no conversations at {path}; name a .jsonl or .parquet file, `smoltalk`, or `tasks`"
        )
    if path.suffix == ".parquet":
        for number, messages in enumerate(parquet_column(path, "messages"), 1):
            yield f"{path}:{number}", messages
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict) or "messages" not in record:
                raise DataError(f'{path}:{number}: needs a "messages" list')
            yield f"{path}:{number}", record["messages"]


class EncodedTexts:
    """Acts as a tokenizer for known texts, which its threads have encoded all at once."""

    def __init__(self, conversations: list[list[dict]], tokenizer: Tokenizer):
        self.bos, self.special = tokenizer.bos, tokenizer.special
        texts = {message.get("content") or "" for messages in conversations for message in messages}
        texts |= {
            tool_expression(message, i)
            for messages in conversations
            for i, message in enumerate(messages)
            if message.get("tool_calls")
        }
        self.ids = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))

    def encode(self, text: str) -> list[int]:
        return self.ids[text]


def rendered(
    conversations: Iterable[list[dict]], tokenizer: Tokenizer
) -> Iterator[tuple[list[dict], list[int], list[bool]]]:
    """Each conversation with its tokens and their loss mask. Some MB of text are encoded at once."""
    batch: list[list[dict]] = []
    characters = 0

    def flush() -> Iterator[tuple[list[dict], list[int], list[bool]]]:
        texts = EncodedTexts(batch, tokenizer)
        yield from ((messages, *render(messages, texts)) for messages in batch)

    for messages in conversations:
        batch.append(messages)
        characters += sum(len(message.get("content") or "") for message in messages)
        if characters > CHARACTERS_AT_ONCE:
            yield from flush()
            batch, characters = [], 0
    yield from flush()


def conversation_rows(
    conversations: Iterable[list[dict]], tokenizer: Tokenizer, T: int, seed: int, shuffle: bool
) -> PackedRows:
    """Packed rows of T tokens in which only the assistant's tokens carry loss.

    Conversations longer than a row are dropped, and their number logged. Text that spells a special token
    stays text.
    """
    dtype = TOKEN_TYPES[version(tokenizer.vocab_size)]
    ids, loss_mask, starts = array(dtype.char), bytearray(), array("q")  # these grow in place
    total = dropped = spelled_special = 0
    for messages, tokens, mask in rendered(conversations, tokenizer):
        total += 1
        spelled_special += any(s in (m.get("content") or "") for m in messages for s in SPECIAL_TOKENS)
        if len(tokens) > T:
            dropped += 1
            continue
        starts.append(len(ids))
        ids.extend(tokens)
        loss_mask.extend(mask)
    if dropped:
        log.info("%d of %d conversations are longer than %d tokens; skipped", dropped, total, T)
    if not starts:
        raise DataError(
            f"no conversation fits the model's context of {T} tokens; shorten them, or train a longer one"
        )
    if spelled_special:
        log.info("%d conversations contain the text of a special token; it stays text", spelled_special)
    ids.append(0)  # the last token of a shard is only a target
    loss_mask.append(False)
    documents = Documents(
        np.frombuffer(ids, dtype), np.frombuffer(starts, np.int64), np.frombuffer(loss_mask, bool)
    )
    return PackedRows([lambda: documents], T, seed, shuffle)


def conversation_digests(rows: PackedRows) -> list[bytes]:
    """16 bytes of the sha256 of each conversation's tokens: to find duplicates and to recognise the data."""
    (documents,) = (shard() for shard in rows.shards)
    ends = np.append(documents.starts[1:], len(documents.tokens) - 1)
    return [
        hashlib.sha256(documents.tokens[start:end]).digest()[:16]
        for start, end in zip(documents.starts, ends, strict=True)
    ]

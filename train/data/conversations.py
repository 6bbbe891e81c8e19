"""Conversations for supervised fine-tuning: the built-in tasks, SmolTalk, or a file of them, as packed rows.

They are read one at a time and kept as tokens: three bytes for each, of SmolTalk about 1.2 GB on every rank.
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
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.shards import CHARACTERS_AT_ONCE, TOKEN_TYPES, Documents, version
from hotlap.train.data.sources import parquet_column, split_documents
from hotlap.train.data.tasks import arithmetic, facts, identity, spelling

# Questions of the built-in mixture, and repeats of its greetings.
ARITHMETIC, SPELLING, IDENTITY = 4000, 6000, 12
TURNS = (1, 1, 1, 2, 3)  # questions in a conversation, each as likely


def built_in(texts: list[str], seed: int) -> list[list[dict]]:
    """Facts, sums, spelling and greetings. texts: where the words to spell come from."""
    conversations = [
        *facts.training_conversations(),
        *arithmetic.training_conversations(ARITHMETIC, seed),
        *spelling.training_conversations(spelling.words(texts), SPELLING, seed),
        *identity.training_conversations(IDENTITY),
    ]
    generator = random.Random(seed)
    generator.shuffle(conversations)
    joined, i = [], 0
    while i < len(conversations):  # conversations of several turns, so that one with a history is nothing new
        turns = generator.choice(TURNS)
        joined.append([message for c in conversations[i : i + turns] for message in c])
        i += turns
    return joined


@cache  # one for both splits
def documentation_tasks(seed: int) -> list[list[dict]]:
    return built_in(split_documents("pydocs")[0], seed)


def conversations_of(split: str, data: str, seed: int) -> Iterator[list[dict]]:
    """The training or validation conversations that `data` names: tasks, smoltalk, or a file.

    smoltalk: each of its splits with that of the tasks, which teach the calculator. It has to be there
    (`download_smoltalk`).
    """
    if data == "smoltalk":
        validation, *train = SMOLTALK.names(len(SMOLTALK.numbers))
        for name in train if split == "train" else [validation]:
            yield from accepted(smoltalk_folder() / name)
    if data in ("tasks", "smoltalk"):
        found: Iterable[list[dict]] = documentation_tasks(seed)
    else:
        found = read_conversations(Path(data))
    yield from (messages for label, messages in labelled_conversations(found) if label == split)


def labelled_conversations(conversations: Iterable[list[dict]]) -> Iterator[tuple[str, list[dict]]]:
    """Each conversation with its split: about one in twenty validates, equal ones on the same side. The first
    ones wait until both splits have one.
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


def smoltalk_folder() -> Path:
    return cache_folder() / "smoltalk"


def smoltalk_plan() -> hub.Plan:
    """What `download_smoltalk` will download. It asks the hub for sizes."""
    return hub.plan(SMOLTALK, smoltalk_folder(), SMOLTALK.names(len(SMOLTALK.numbers)))


def download_smoltalk() -> None:
    """Have SmolTalk's files in the cache, checked."""
    hub.download(SMOLTALK, smoltalk_folder(), SMOLTALK.names(len(SMOLTALK.numbers)))


def read_conversations(path: Path) -> Iterator[list[dict]]:
    """Conversations of a .jsonl file, one {"messages": [...]} a line, or of the column `messages` of a
    .parquet file; DataError with file and line or row where one is not as it has to be.
    """
    empty = True
    for place, messages in records(path):
        try:
            yield checked(messages)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        empty = False
    if empty:
        raise DataError(f'{path} holds no conversation; each line or row is {{"messages": [...]}}')


def accepted(path: Path) -> Iterator[list[dict]]:
    """Those conversations of a public file that can be learned from; how many others there are is logged."""
    total, refused, first = 0, 0, ""
    for place, messages in records(path):
        total += 1
        try:
            yield checked(messages)
        except DataError as error:
            refused, first = refused + 1, first or f"{place}: {error}"
    if refused:
        log.info("%s: %d of %d conversations are left out, the first: %s", path.name, refused, total, first)


def checked(messages: object) -> list[dict]:
    messages = check_messages(messages)
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise DataError("the conversation does not end with the assistant's answer")
    return messages


def records(path: Path) -> Iterator[tuple[str, object]]:
    """What a file has as `messages`, and where: path:line, or path:row. Nothing of it is checked."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no conversations at {path}; name a .jsonl or .parquet file, or `tasks` or `smoltalk`"
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
    """Stands for a tokenizer where the texts to come are known: its threads encode them all at once."""

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
    """Each conversation with its tokens and which of them the assistant says, encoded some MB at once."""
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
    """Packed rows in which only what the assistant says carries loss.

    A conversation longer than a row is dropped, and counted; one that holds the text of a special token has
    it as text.
    """
    dtype = TOKEN_TYPES[version(tokenizer.vocab_size)]
    ids, said, starts = array(dtype.char), bytearray(), array("q")  # which grow in place
    total = dropped = spelled_special = 0
    for messages, tokens, mask in rendered(conversations, tokenizer):
        total += 1
        spelled_special += any(s in (m.get("content") or "") for m in messages for s in SPECIAL_TOKENS)
        if len(tokens) > T:
            dropped += 1
            continue
        starts.append(len(ids))
        ids.extend(tokens)
        said.extend(mask)
    if dropped:
        log.info("%d of %d conversations are longer than %d tokens and left out", dropped, total, T)
    if not starts:
        raise DataError(
            f"no conversation fits the model's context of {T} tokens; shorten them, or train a longer one"
        )
    if spelled_special:
        log.info("%d conversations hold the text of a special token; it stays text", spelled_special)
    ids.append(0)  # the last token of a shard is a target only
    said.append(False)
    documents = Documents(
        np.frombuffer(ids, dtype), np.frombuffer(starts, np.int64), np.frombuffer(said, bool)
    )
    return PackedRows([lambda: documents], T, seed, shuffle)


def conversation_digests(rows: PackedRows) -> list[bytes]:
    """16 bytes of the sha256 of each conversation's tokens: which are equal, and whether all are the same."""
    (documents,) = (shard() for shard in rows.shards)
    ends = np.append(documents.starts[1:], len(documents.tokens) - 1)
    return [
        hashlib.sha256(documents.tokens[start:end]).digest()[:16]
        for start, end in zip(documents.starts, ends, strict=True)
    ]

"""Conversations for supervised fine-tuning: the built-in tasks, or a file of them, as packed rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from hotlap.model.conversation import check_messages, render
from hotlap.model.errors import DataError
from hotlap.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from hotlap.train.data import PackedRows
from hotlap.train.log import log
from hotlap.train.shards import Documents
from hotlap.train.tasks import arithmetic, facts, identity, spelling

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


def read_conversations(path: Path) -> list[list[dict]]:
    """Conversations of a .jsonl file, one {"messages": [...]} a line; DataError with file and line."""
    if not path.is_file():
        raise FileNotFoundError(f"no conversations at {path}; name a .jsonl file, or `tasks`")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict) or "messages" not in record:
            raise DataError(f'{path}:{number}: needs a "messages" list')
        try:
            messages = check_messages(record["messages"])
            if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
                raise DataError("the conversation does not end with the assistant's answer")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        found.append(messages)
    if not found:
        raise DataError(f'{path} holds no conversation; each line is {{"messages": [...]}}')
    return found


def split_conversations(
    conversations: list[list[dict]],
) -> tuple[list[list[dict]], list[list[dict]]]:
    """Training and validation, about one in twenty, equal conversations on the same side."""
    train, held_out = [], []
    for messages in conversations:
        number = random.Random(json.dumps(messages, sort_keys=True)).random()
        (held_out if number < 0.05 else train).append(messages)
    if not train or not held_out:  # too few to leave it to chance
        both = train + held_out
        return both[1:] or both, both[:1]
    return train, held_out


def conversation_rows(
    conversations: list[list[dict]], tokenizer: Tokenizer, T: int, seed: int, shuffle: bool
) -> PackedRows:
    """Packed rows in which only what the assistant says carries loss.

    A conversation longer than a row is dropped, and counted; one that holds the text of a special token has
    it as text.
    """
    ids: list[np.ndarray] = []
    said: list[np.ndarray] = []
    starts, total, dropped, spelled_special = [], 0, 0, 0
    for messages in conversations:
        tokens, mask = render(messages, tokenizer)
        spelled_special += any(s in (m.get("content") or "") for m in messages for s in SPECIAL_TOKENS)
        if len(tokens) > T:
            dropped += 1
            continue
        starts.append(total)
        ids.append(np.array(tokens, np.int64))
        said.append(np.array(mask, bool))
        total += len(tokens)
    if dropped:
        log.info(
            "%d of %d conversations are longer than %d tokens and left out",
            dropped,
            len(conversations),
            T,
        )
    if not ids:
        raise DataError(
            f"no conversation fits the model's context of {T} tokens; shorten them, or train a longer one"
        )
    if spelled_special:
        log.info("%d conversations hold the text of a special token; it stays text", spelled_special)
    ids.append(np.zeros(1, np.int64))  # the last token of a shard is a target only
    said.append(np.zeros(1, bool))
    documents = Documents(np.concatenate(ids), np.array(starts), np.concatenate(said))
    return PackedRows([lambda: documents], T, seed, shuffle)

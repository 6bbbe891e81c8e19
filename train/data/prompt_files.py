"""Prompts in a user's file: a line of JSON each, or a row each of a table.

A record has a `prompt`, a string or a list of messages that the user's ends, as in TRL; its reward may read
all of it.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hotlap.common.errors import DataError
from hotlap.model.messages import check_messages, shown
from hotlap.train.data.conversation_files import SPOKEN, check_characters
from hotlap.train.data.preferences import spoken_by
from hotlap.train.data.record_files import record_files, records
from hotlap.train.data.splits import SPLITS

RECORD = '{"prompt": "...", ...}, as a string or a list of messages, with what the reward reads'
OTHER_NAMES = ("question", "problem", "instruction", "query")  # of a prompt


def read_prompts(path: Path) -> Iterator[tuple[str, list[dict], dict]]:
    """Place, messages and record of each line or row. DataError names the place of an invalid one, or says
    that the file has none.
    """
    empty = True
    for place, record in records(path, RECORD):
        try:
            messages = checked(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        yield place, messages, record
        empty = False
    if empty:
        raise DataError(f"{path} holds no prompt; each line or row must be {RECORD}")


def split_prompts(path: Path, split: str) -> list[tuple[str, list[dict], dict]]:
    """The prompts of one split: equal ones share theirs, about 1 in 20 validates, and a single one does
    both. A data set's folder may have its own splits.
    """
    from hotlap.train.data.conversation_rows import held_out, shortest

    files = record_files(path)
    if any(own for _, own in files):
        return [prompt for file, own in files if own == split for prompt in read_prompts(file)]
    found = [prompt for file, _ in files for prompt in read_prompts(file)]
    texts = [json.dumps(messages, sort_keys=True) for _, messages, _ in found]
    draws = np.array([random.Random(text).random() for text in texts])
    sizes = np.array([len(text) for text in texts])
    validates = held_out(draws, sizes)
    if not validates.any():
        validates = shortest(draws, sizes)
    if validates.all():
        return found
    wanted = SPLITS.index(split)  # 1 validates
    return [prompt for prompt, chosen in zip(found, validates, strict=True) if chosen == wanted]


def checked(record: object) -> list[dict]:
    """The messages of a record's prompt in their plain form. DataError says what is wrong with it."""
    if not isinstance(record, dict):
        raise DataError(f"{shown(record)}; each line must be {RECORD}")
    if record.get("prompt") is None:
        raise DataError(f"no 'prompt', but {shown(record)}; {other_format(record)}")
    if lost := [key for key in SPOKEN if record.get(key)]:
        raise DataError(f"{lost[0]!r} would be lost; write it into the prompt's messages, and remove it")
    messages = check_messages(spoken_by("user", record["prompt"], "prompt"))
    if messages[-1]["role"] != "user":
        raise DataError(
            f"'prompt' ends with a message from {messages[-1]['role']!r}; it must end with the user's, which "
            "the model answers"
        )
    check_characters(messages)
    return messages


def other_format(record: dict) -> str:
    """What to do with a record without `prompt`."""
    if "messages" in record:
        return "write the messages before the answer as `prompt`"
    near = [*OTHER_NAMES, *difflib.get_close_matches("prompt", [key for key in record if key.isascii()])]
    if found := [key for key in near if key in record]:
        return f"rename {found[0]!r} to 'prompt'"
    return f"each line must be {RECORD}"

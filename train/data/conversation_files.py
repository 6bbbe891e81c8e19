"""Conversations in files: a line of JSON each, or a row each of the column `messages` of a table."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.messages import call_text, check_messages, shown
from hotlap.train.data.record_files import records
from hotlap.train.data.tables import column_names, is_table

T = TypeVar("T")
RECORD = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
SPOKEN = ("system", "system_prompt", "tools", "functions")  # beside `messages`, these would be lost
ONLY_MESSAGES = "write what the model is to read into `messages`, a system message first, and remove it"
OTHER_FORMATS = {  # by a key of theirs
    "conversations": "this is ShareGPT's format: rename it to `messages`, in it `from` to `role`, `value` to "
    "`content`, 'human' to 'user' and 'gpt' to 'assistant'",
    "completion": "prompt and completion are the contents of a user's and an assistant's message",
    "response": "prompt and response are the contents of a user's and an assistant's message",
    "output": "instruction and input are the content of a user's message, output of an assistant's",
    "chosen": "only one answer is learned: write the chosen one as the assistant's message",
    "text": "text without roles is for `hotlap pretrain`",
}


def read_conversations(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """The conversations of a user's file, each after its place: path:line or path:row. DataError names the
    place of an invalid one. Keys beside `messages` are ignored, which is logged.
    """
    lacking = f"no conversation; each line or row must be {RECORD}"
    return every_record(path, conversation_records(path), checked, ("messages",), lacking)


def accepted(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """The valid conversations of a public file. How many others are skipped is logged."""
    return valid_records(path, conversation_records(path), checked, "conversations")


def every_record(
    path: Path,
    found: Iterable[tuple[str, object]],
    check: Callable[[object], T],
    keys: tuple[str, ...],
    lacking: str,
) -> Iterator[tuple[str, T]]:
    """What `check` makes of each record of a user's file, after its place. DataError names the place of an
    invalid one, or says that the file holds none. Other keys than these are ignored, which is logged.
    """
    ignored: Counter[str] = Counter()
    empty = True
    for place, record in found:
        try:
            value = check(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        ignored.update(key for key, given in record.items() if key not in keys and given is not None)
        yield place, value
        empty = False
    if empty:
        raise DataError(f"{path} holds {lacking}")
    if ignored:
        counts = ", ".join(f"{key!r} ({count:,})" for key, count in ignored.items())
        beside = ", ".join(f"`{key}`" for key in keys)
        log.info("%s: ignored keys beside %s, with the lines that have them: %s", path, beside, counts)


def valid_records(
    path: Path, found: Iterable[tuple[str, object]], check: Callable[[object], T], kind: str
) -> Iterator[tuple[str, T]]:
    """What `check` makes of the valid records of a public file, each after its place. How many others are
    skipped is logged. kind: what they are, in the plural.
    """
    total, refused, first = 0, 0, ""
    for place, record in found:
        total += 1
        try:
            value = check(record)
        except DataError as error:
            refused, first = refused + 1, first or f"{place}: {error}"
        else:
            yield place, value
    if refused:
        log.info("%s: skipped %d of %d %s, the first: %s", path.name, refused, total, kind, first)


def conversation_records(path: Path) -> Iterator[tuple[str, object]]:
    """The unchecked record of each line or row of a file of conversations, after its place."""
    if not path.exists():
        raise FileNotFoundError(f"no conversations at {path}; name a .jsonl or .parquet file")
    if is_table(path):
        check_columns(path)
    yield from records(path, RECORD, ("messages",))


def check_columns(path: Path) -> None:
    """Raise DataError if a table has a column that would be lost."""
    if lost := [name for name in column_names(path) if name in SPOKEN]:
        raise DataError(f"{path}: the column {lost[0]!r} beside `messages` would be lost; {ONLY_MESSAGES}")


def checked(record: object) -> list[dict]:
    """The messages of a record, in their plain form, if they are some to learn from; else DataError."""
    if not isinstance(record, dict):
        raise DataError(f"{shown(record)}; each line must be {RECORD}")
    if "messages" not in record:
        raise DataError(f'needs a "messages" list, not {shown(record)}; {other_format(record)}')
    if lost := [key for key in SPOKEN if record.get(key)]:
        raise DataError(f"{lost[0]!r} beside `messages` would be lost; {ONLY_MESSAGES}")
    messages = check_messages(record["messages"])
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        found = "a call of its tool" if last.get("tool_calls") else f"a message from {last['role']!r}"
        raise DataError(f"the conversation does not end with the assistant's answer, but with {found}")
    check_characters(messages)
    return messages


def check_characters(messages: list[dict]) -> None:
    """Raise DataError if a message holds half of a character, which no tokenizer reads."""
    for i, message in enumerate(messages):
        try:
            (message["content"] + (call_text(message) if message.get("tool_calls") else "")).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"message {i}: {half!a} is half of a character; was the text cut off?") from None


def other_format(record: dict) -> str:
    """What to do with a record without `messages`."""
    for key in record:
        if key in OTHER_FORMATS:
            return OTHER_FORMATS[key]
        if difflib.get_close_matches(key.lower(), ["messages"], cutoff=0.8):
            return f"rename {key!r} to 'messages'"
    return f"each line must be {RECORD}"

"""Preference pairs: a prompt, an answer that is preferred, and one that is not.

They are read from `.jsonl` or `.parquet` files in TRL's forms: `prompt`, `chosen` and `rejected` as strings
or lists of messages, or without `prompt`, where `chosen` and `rejected` are whole conversations that begin
with the same messages. `ultrafeedback` is a download.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.messages import check_messages, shown
from hotlap.train.data import hub
from hotlap.train.data.conversation_files import (
    SPOKEN,
    check_characters,
    every_record,
    valid_records,
)
from hotlap.train.data.conversations import SOURCES
from hotlap.train.data.datasets import ULTRAFEEDBACK
from hotlap.train.data.record_files import record_files, records
from hotlap.train.data.tables import column_names, is_table
from hotlap.train.data.text_files import named_path

FORM = '{"prompt": "...", "chosen": "...", "rejected": "..."}, as strings or lists of messages'
SIDES = ("chosen", "rejected")
COLUMNS = ("prompt", *SIDES)
NAMES = DOWNLOADED, SAMPLED = "ultrafeedback", "tasks"  # in `--data`; anything else is a file
NEEDED = f"name a .jsonl or .parquet file, `{DOWNLOADED}`, or `{SAMPLED}`"


class Pair(NamedTuple):
    """place: file and line, or another name. split: the data set's own; None: the prompt's text decides."""

    place: str
    prompt: list[dict]
    chosen: list[dict]
    """The messages after the prompt, which end with the assistant's answer."""
    rejected: list[dict]
    split: str | None = None


def check_data(data: Sequence[str]) -> None:
    """Raise FileNotFoundError or ValueError for what is no data set of pairs and no file, or is there
    twice.
    """
    seen = set()
    for name in data:
        path = named_path(name)
        if name in NAMES:
            identity = name
            if path.exists():
                log.info("%s: hotlap's own data set, not your file, which is ./%s", name, name)
        elif os.path.lexists(path):
            identity = os.path.realpath(path)
        else:
            raise no_pairs(name)
        if identity in seen:
            raise ValueError(f"the data {name} is there twice; name it once (--epochs 2 is two passes)")
        seen.add(identity)


def check_pairs(data: Sequence[str]) -> None:
    """`check_data`, and read the files to their ends, so that their errors show before a long run."""
    check_data(data)
    for name in data:
        if name not in NAMES:
            for path, _ in record_files(named_path(name)):
                for _ in read_pairs(path):
                    pass


def no_pairs(name: str) -> Exception:
    """What is wrong with a name of `--data` that is no data set of pairs and no file."""
    before, _, _ = name.rpartition(":")
    if before in NAMES or (before and os.path.lexists(named_path(before))):
        return ValueError(f"the data {name} has a weight, which only `hotlap sft` knows; write {before}")
    if name in SOURCES:
        return ValueError(f"the data {name} are conversations, for `hotlap sft`; {NEEDED}")
    return FileNotFoundError(f"no pairs at {name}; {NEEDED}")


def pairs_of(name: str) -> Iterator[Pair]:
    """The pairs that one name of `--data` means, unless it is `tasks`. UltraFeedback must have been
    downloaded (`download_pairs`).
    """
    if name != DOWNLOADED:
        for path, split in record_files(named_path(name)):
            yield from (pair._replace(split=split) for pair in read_pairs(path))
        return
    for split, files in ULTRAFEEDBACK.files.items():
        for file in files:
            yield from accepted_pairs(ULTRAFEEDBACK.folder / file, split)


def download_pairs(data: tuple[str, ...]) -> None:
    """Download and check what `data` names, if it is on the hub and not in the cache yet."""
    if DOWNLOADED in data:
        hub.download(ULTRAFEEDBACK, ULTRAFEEDBACK.folder, ULTRAFEEDBACK.names(1))


def pair_plans(data: Sequence[str]) -> list[hub.DownloadPlan]:
    """What `download_pairs` will download."""
    if DOWNLOADED not in data:
        return []
    return [hub.plan_download(ULTRAFEEDBACK, ULTRAFEEDBACK.folder, ULTRAFEEDBACK.names(1))]


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a user's file. DataError names the place of an invalid one. Other keys are ignored, which
    is logged.
    """
    lacking = f"no pair; each line or row must be {FORM}"
    for place, pair in every_record(path, pair_records(path), checked_pair, COLUMNS, lacking):
        yield pair._replace(place=place)


def accepted_pairs(path: Path, split: str) -> Iterator[Pair]:
    """The valid pairs of a public file. How many others are skipped is logged."""
    for place, pair in valid_records(path, pair_records(path), checked_pair, "pairs"):
        yield pair._replace(place=place, split=split)


def pair_records(path: Path) -> Iterator[tuple[str, object]]:
    """The unchecked record of each line or row of a file, after its place."""
    if not path.exists():
        raise FileNotFoundError(f"no pairs at {path}; {NEEDED}")
    return records(path, FORM, pair_columns(path) if is_table(path) else None)


def pair_columns(path: Path) -> list[str]:
    """The columns of a table to read. DataError if one that is there would be lost."""
    names = column_names(path)
    if lost := [name for name in names if name in SPOKEN]:
        raise DataError(f"{path}: the column {lost[0]!r} would be lost; write it into the prompt's messages")
    return [name for name in COLUMNS if name in names or name in SIDES]


def checked_pair(record: object) -> Pair:
    """The pair of a record in its plain form, without its place. DataError says what is wrong with it."""
    if not isinstance(record, dict):
        raise DataError(f"{shown(record)}; each line must be {FORM}")
    for side in SIDES:
        if record.get(side) is None:
            hint = "one answer alone is for `hotlap sft`" if "messages" in record else f"it must be {FORM}"
            raise DataError(f"no {side!r}, but {shown(record)}; {hint}")
    if lost := [key for key in SPOKEN if record.get(key)]:
        raise DataError(f"{lost[0]!r} would be lost; write it into the prompt's messages, and remove it")
    given = record.get("prompt")
    prompt = spoken_by("user", given, "prompt") if given is not None else None
    answers = [spoken_by("assistant", record[side], side) for side in SIDES]
    if any(begins_conversation(answer) for answer in answers):
        prompt, answers = without_prompt(prompt, isinstance(given, str), answers)
    elif prompt is None:
        raise DataError(f"no 'prompt', but {shown(record)}; it must be {FORM}")
    plain = [answer_after(prompt, answer, side) for answer, side in zip(answers, SIDES, strict=True)]
    return Pair("", plain[0][: len(prompt)], *(messages[len(prompt) :] for messages in plain))


def spoken_by(role: str, value: object, key: str) -> list[dict]:
    """The messages of a key of a record: a string is one message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{key!r} must be a string or a list of messages, not {shown(value)}")
    return [without_nulls(message) for message in value]


def without_nulls(message: dict) -> dict:
    """Parquet gives every message all keys."""
    return {key: value for key, value in message.items() if value is not None}


def begins_conversation(messages: list[dict]) -> bool:
    return messages[0].get("role") in ("system", "user")


def without_prompt(
    prompt: list[dict] | None, is_text: bool, conversations: list[list[dict]]
) -> tuple[list[dict], list[list[dict]]]:
    """The messages with which two whole conversations begin alike, and the rest of each.

    prompt: what the record says it is, which must be how they begin; if it was a text (is_text), one of the
    user's messages.
    """
    chosen, rejected = conversations
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == min(len(chosen), len(rejected)):  # one answer twice, or one is how the other begins
        same = max((i for i in range(same) if chosen[i].get("role") == "user"), default=-1) + 1
    common = chosen[:same]
    if same == 0 or any(m[same].get("role") in ("system", "user") for m in conversations if len(m) > same):
        raise DataError(
            f"the prompts of 'chosen' and 'rejected' differ in message {same}; they must be answers to the "
            "same one"
        )
    if prompt is not None:
        texts = [str(message.get("content")).strip() for message in common]
        agrees = prompt[0]["content"].strip() in texts if is_text else common[: len(prompt)] == prompt
        if not agrees:
            raise DataError("'prompt' is not how 'chosen' and 'rejected' begin; correct it, or remove it")
    return common, [messages[same:] for messages in conversations]


def answer_after(prompt: list[dict], answer: list[dict], side: str) -> list[dict]:
    """The messages of a prompt and an answer in their plain form. DataError if they are no conversation that
    the assistant ends.
    """
    if not answer:
        raise DataError(f"{side!r} has no answer after the prompt")
    try:
        messages = check_messages([*prompt, *answer])
        check_characters(messages)
    except DataError as error:
        raise DataError(f"prompt and {side!r}: {error}") from None
    if messages[len(prompt)]["role"] != "assistant":
        raise DataError(
            f"{side!r} begins with a message from {messages[len(prompt)]['role']!r}, not from the assistant"
        )
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        found = "a call of its tool" if last.get("tool_calls") else f"a message from {last['role']!r}"
        raise DataError(f"{side!r} does not end with the assistant's answer, but with {found}")
    return messages

"""Conversations for fine-tuning, from the data sets that a mixture names: built-in, on the hub, or files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hotlap.common.log import log
from hotlap.train.data import hub
from hotlap.train.data.bigbench import bigbench_conversations, bigbench_plan, download_bigbench
from hotlap.train.data.conversation_files import accepted, read_conversations
from hotlap.train.data.datasets import GSM8K, MMLU, SMOLTALK, Dataset
from hotlap.train.data.mixtures import Part
from hotlap.train.data.record_files import record_files
from hotlap.train.data.tasks import gsm8k, multiple_choice
from hotlap.train.data.tasks.built_in import TASKS, built_in
from hotlap.train.data.text_files import named_path


class Conversation(NamedTuple):
    """place: file and line, or another name. split: the data set's own; None: the text decides. part: its
    number in the mixture.
    """

    place: str
    messages: list[dict]
    split: str | None = None
    part: int = 0


class Source(NamedTuple):
    """A data set with a name. read: its conversations for a seed, once it is downloaded. plan: what
    `download` will fetch; it may ask the hub for sizes.
    """

    read: Callable[[int], Iterator[Conversation]]
    plan: Callable[[], hub.DownloadPlan] | None = None
    download: Callable[[], None] = lambda: None


def made(*tasks: str) -> Source:
    """A source of built-in tasks."""

    def read(seed: int) -> Iterator[Conversation]:
        for number, messages in enumerate(built_in(tasks, seed), 1):
            yield Conversation(f"{tasks[0] if len(tasks) == 1 else 'task'} {number}", messages)

    return Source(read)


def on_hub(
    dataset: Dataset, splits: Sequence[str], read: Callable[[Path], Iterator[tuple[str, list[dict]]]]
) -> Source:
    """A source of these splits of a data set, with `read` for a file. A single one is split by the text."""
    names = [name for split in splits for name in dataset.files[split]]

    def conversations(seed: int) -> Iterator[Conversation]:
        for split in splits:
            for name in dataset.files[split]:
                for place, messages in read(dataset.folder / name):
                    yield Conversation(place, messages, split if len(splits) > 1 else None)

    return Source(
        conversations,
        plan=lambda: hub.plan_download(dataset, dataset.folder, names),
        download=lambda: hub.download(dataset, dataset.folder, names),
    )


SOURCES = {
    "tasks": made(*TASKS),
    **{task: made(task) for task in TASKS},
    "smoltalk": on_hub(SMOLTALK, ("train", "validation"), accepted),
    "gsm8k": on_hub(GSM8K, ("train",), gsm8k.conversations_of),
    "mmlu": on_hub(MMLU, ("train", "validation"), multiple_choice.conversations_of),
    "bigbench": Source(
        lambda seed: (Conversation(place, messages) for place, messages in bigbench_conversations()),
        bigbench_plan,
        download_bigbench,
    ),
}


def conversations_of(parts: Sequence[Part], seed: int) -> Iterator[Conversation]:
    """The conversations of a mixture, once each, part by part. It must have been downloaded
    (`download_conversations`).
    """
    for number, part in enumerate(parts):
        found = SOURCES[part.name].read(seed) if part.name in SOURCES else file_conversations(part)
        for conversation in found:
            yield conversation._replace(part=number)


def file_conversations(part: Part) -> Iterator[Conversation]:
    for path, split in record_files(named_path(part.name)):
        for place, messages in read_conversations(path):
            yield Conversation(place, messages, split)


def check_parts(parts: Sequence[Part]) -> None:
    """Raise FileNotFoundError for a part that is no data set and no file, DataError for a folder, ValueError
    for one that is there twice.
    """
    seen: dict[str, str] = {}
    for part in parts:
        path = named_path(part.name)
        if part.name in SOURCES:
            identity = part.name
            if path.exists():
                log.info("%s: hotlap's own data set, not your file, which is ./%s", part.name, part.name)
        elif os.path.lexists(path):
            record_files(path)  # whose error says what is wrong with a folder
            identity = os.path.realpath(path)
        else:
            near = difflib.get_close_matches(part.name, SOURCES, n=1)
            hint = f"did you mean {near[0]}? Else " if near else ""
            names = f"a .jsonl or .parquet file, or {', '.join(SOURCES)}"
            raise FileNotFoundError(f"no conversations at {part.name}; {hint}name {names}")
        if first := seen.get(identity):
            again = "there twice" if part.name == first else f"{first} under another name"
            raise ValueError(
                f"the data {part.name} is {again}; name it once, with a weight, such as {part.name}:2"
            )
        seen[identity] = part.name


def check_conversations(parts: Sequence[Part]) -> None:
    """`check_parts`, and read the files to their ends, so that their errors show before a long run."""
    check_parts(parts)
    for part in parts:
        if part.name not in SOURCES:
            for _ in file_conversations(part):
                pass


def conversation_plans(parts: Sequence[Part]) -> list[hub.DownloadPlan]:
    """What `download_conversations` will download, by data set."""
    sources = [SOURCES[part.name] for part in parts if part.name in SOURCES]
    return [source.plan() for source in sources if source.plan]


def download_conversations(parts: Sequence[Part]) -> None:
    """Download and check the data sets that are not in the cache yet."""
    for part in parts:
        if part.name in SOURCES:
            SOURCES[part.name].download()

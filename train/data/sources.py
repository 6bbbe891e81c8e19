"""What a data string names, and the text in it, document by document.

The names in TEXTS are texts that hotlap knows; anything else is a file, a folder or a glob pattern of text
files, or a folder of token shards. `hotlap data` and `hotlap tokenizer` take public datasets too (public.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.log import log_once
from hotlap.train.data.bigbench_text import bigbench_documents
from hotlap.train.data.dataset_folders import own_splits
from hotlap.train.data.documentation import machine_documentation
from hotlap.train.data.file_documents import file_documents
from hotlap.train.data.pydocs import python_documentation
from hotlap.train.data.shakespeare import shakespeare_plays
from hotlap.train.data.splits import SPLITS, labelled, with_text
from hotlap.train.data.text_files import TEXT_FILES, named_path, text_files

TEXTS = {
    "pydocs": python_documentation,
    "docs": machine_documentation,
    "shakespeare": shakespeare_plays,
    "bigbench": bigbench_documents,
}
DATASETS = ("fineweb", "climbmix")  # downloaded and tokenized by `hotlap data`


def is_named(data: str, names: tuple[str, ...]) -> bool:
    """Whether a data string is one of these names. A file or folder that has the same one is logged."""
    if data in names and os.path.lexists(data):
        log_once(f"{data} is hotlap's own text; ./{data} is yours")
    return data in names


def shard_folder(data: str) -> Path | None:
    """The folder of token shards that a data string names; None if it names text. DataError for nanoGPT's."""
    folder = named_path(data)
    if data in TEXTS or not folder.is_dir() or not any(folder.glob("*.bin")):
        return None
    if (folder / "train.bin").is_file():
        raise DataError(
            f"{folder}/train.bin is nanoGPT's, which has no header that says what is in it; make shards of "
            "its text with `hotlap data`, or of its tokens as docs/data.md shows"
        )
    return folder


def documents(data: str, errors: str = "strict") -> Iterator[str]:
    """The documents of the text that a data string names.

    errors: `strict` raises DataError for bytes that are not UTF-8, `replace` replaces them.
    """
    if is_named(data, tuple(TEXTS)):
        yield from TEXTS[data]()
    else:
        for path in files_of(data):
            yield from file_documents(path, errors)


def files_of(data: str) -> list[Path]:
    """The text files that a data string names. If there are none, the FileNotFoundError says what to name."""
    try:
        return text_files(data)
    except FileNotFoundError as error:
        if data in DATASETS:
            message = f"no folder {data}; run `hotlap data --source {data}` and name the folder that it makes"
        else:
            message = (
                f"{error}; name a file ({', '.join(TEXT_FILES)}), a folder or pattern of them, "
                f"{', '.join(TEXTS)}, or (to train or evaluate) a folder of token shards"
            )
        raise FileNotFoundError(message) from None


def labelled_documents(
    data: str, errors: str = "strict", only: str | None = None
) -> Iterator[tuple[str, str]]:
    """Each document, or a part of it, with its split: that of its file, in the folder of a data set that has
    some, or else splits.py's. only: leave out the documents of another split, whose files need not be read.
    """
    folder = named_path(data)
    files = own_splits(files_of(data), folder) if data not in TEXTS and folder.is_dir() else []
    if not any(split for _, split in files):
        found = labelled(documents(data, errors), data)
        yield from (pair for pair in found if only in (None, pair[0]))
        return
    for path, split in files:
        if only in (None, split):
            yield from ((split, text) for text in with_text(file_documents(path, errors), data))


def split_documents(data: str, errors: str = "strict") -> tuple[list[str], list[str]]:
    """The training and the validation documents."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in labelled_documents(data, errors):
        parts[split].append(document)
    return parts["train"], parts["validation"]


def documents_of(split: str, data: str, errors: str = "strict") -> Iterator[str]:
    """One split of `split_documents`, streamed: for text larger than memory."""
    return (text for _, text in labelled_documents(data, errors, only=split))

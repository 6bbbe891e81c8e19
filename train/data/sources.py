"""What a data string names, and the text in it, document by document.

`pydocs` and `shakespeare` are built-in texts; anything else is a file, a folder or a glob pattern of text
files, or a folder of token shards. `hotlap data` and `hotlap tokenizer` take public datasets too (public.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.train.data.pydocs import python_documentation
from hotlap.train.data.shakespeare import shakespeare_plays

TEXTS = {"pydocs": python_documentation, "shakespeare": shakespeare_plays}
DATASETS = ("fineweb", "climbmix")  # downloaded and tokenized by `hotlap data`
SPLITS = ("train", "validation")
TEXT_FILES = (".txt", ".md", ".py", ".jsonl", ".parquet")
PARQUET_ROWS = 1024  # read at once


def shard_folder(data: str) -> Path | None:
    """The folder of token shards that a data string names; None if it names text."""
    folder = Path(data)
    return folder if folder.is_dir() and any(folder.glob("*.bin")) else None


def documents(data: str, errors: str = "strict") -> Iterator[str]:
    """The documents of the text that a data string names.

    errors: `strict` raises DataError for bytes that are not UTF-8, `replace` replaces them.
    """
    if data in TEXTS:
        yield from TEXTS[data]()
    else:
        for path in text_files(data):
            yield from file_documents(path, errors)


def text_files(data: str) -> list[Path]:
    """The text files that a path, folder or pattern matches, sorted. If there are none, the FileNotFoundError
    says what a data string may name.
    """
    path = Path(data)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in TEXT_FILES]
    else:
        found = [Path(p) for p in glob.glob(data, recursive=True) if os.path.isfile(p)]
    if found:
        return sorted(found)
    if data in DATASETS:
        raise FileNotFoundError(
            f"no folder {data}; run `hotlap data --source {data}` and name the folder that it makes"
        )
    raise FileNotFoundError(
        f"no text files match {data!r}; name a file ({', '.join(TEXT_FILES)}), a folder or pattern of them, "
        f"{', '.join(TEXTS)}, or (to train or evaluate) a folder of token shards"
    )


def split_documents(data: str, errors: str = "strict") -> tuple[list[str], list[str]]:
    """Training and validation documents without duplicates. The hash of its text decides a document's split;
    about 1 in 20 validates.
    """
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in labelled_documents(data, errors):
        parts[split].append(document)
    return parts["train"], parts["validation"]


def documents_of(split: str, data: str, errors: str = "strict") -> Iterator[str]:
    """One split of `split_documents`, streamed: for text larger than memory."""
    return (text for label, text in labelled_documents(data, errors) if label == split)


def labelled_documents(data: str, errors: str) -> Iterator[tuple[str, str]]:
    """Each distinct document with its split. The first ones are held back until both splits have one."""
    waiting: list[tuple[str, str]] = []
    seen, found = set(), set()
    for document in documents(data, errors):
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:16]
        if document.strip() and digest not in seen:
            seen.add(digest)
            split = SPLITS[digest[0] < 256 // 20]
            found.add(split)
            waiting.append((split, document))
            if len(found) == 2:
                yield from waiting
                waiting.clear()
    if not found:
        raise DataError(f"{data!r} holds no text; name files with text in them, or pydocs")
    if waiting:  # too few documents to leave it to chance
        texts = [text for _, text in waiting]
        train, validation = split_text(texts[0]) if len(texts) == 1 else (texts[1:], texts[:1])
        yield from (("train", text) for text in train)
        yield from (("validation", text) for text in validation)


def split_text(text: str) -> tuple[list[str], list[str]]:
    """Split a single text as nanoGPT does: the first 90 % trains, the rest validates."""
    cut = int(len(text) * 0.9)
    return [text[:cut]], [text[cut:]]


def file_documents(path: Path, errors: str) -> Iterator[str]:
    """The documents of a file: each row of a .parquet and each line of a .jsonl file (its field `text`); any
    other file is one document.
    """
    if path.suffix == ".parquet":
        yield from parquet_documents(path)
        return
    raw = path.read_bytes()
    if b"\0" in raw[:8192] or raw[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is binary or compressed; unpack it, or name text files")
    try:
        text = raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, or run `hotlap data` with "
            "--errors replace"
        ) from None
    text = text.replace("\r\n", "\n")
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 does not end a line of JSON
        if line.strip():
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise DataError(f'{path}:{number}: each line must be {{"text": "..."}}')
            yield document


def parquet_documents(path: Path) -> Iterator[str]:
    """The column `text` of a parquet file, without its nulls."""
    for text in parquet_column(path, "text"):
        if text is not None:
            if not isinstance(text, str):
                raise DataError(f"{path} has {type(text).__name__} in the column `text`; it must be strings")
            yield text


def parquet_column(path: Path, name: str) -> Iterator[object]:
    """The values of one column, read in batches. DataError if the file is damaged, is no parquet file, or has
    no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'hotlap[data]'") from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            if name not in file.schema_arrow.names:
                raise DataError(f"{path} has the columns {file.schema_arrow.names}; it needs `{name}`")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[name]):
                yield from batch.column(name).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's error, not pyarrow's
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged, or not a parquet file ({reason})") from error

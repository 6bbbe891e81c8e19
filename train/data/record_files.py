"""Records in files: a line of JSON each, or a row each of a parquet or Arrow file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import unique
from hotlap.train.data.compressed import inner_ending
from hotlap.train.data.dataset_folders import RECORDS, is_dataset, own_splits
from hotlap.train.data.file_documents import text_parts
from hotlap.train.data.tables import is_table, table_rows
from hotlap.train.data.text_files import require_file, text_files


def record_files(path: Path) -> list[tuple[Path, str | None]]:
    """The file at a path, or the files of a data set's folder, each with its split, `train` or `validation`.
    None: the folder has no files to validate on, so that the text decides. DataError for another folder.
    """
    if not path.is_dir():
        return [(path, None)]
    try:
        files = text_files(str(path))
    except FileNotFoundError:
        files = []
    if not is_dataset(files, path):
        raise DataError(f"{path} is a folder; name a file in it. A model is named first, or with --base")
    return own_splits([file for file in files if inner_ending(file) in RECORDS], path)


def records(path: Path, form: str, columns: Sequence[str] | None = None) -> Iterator[tuple[str, object]]:
    """The unchecked record of each line or row of a file, after its place: path:number.

    form: what a line must be, for errors. columns: those of a table to read; None reads all.
    """
    require_file(path)
    if not is_table(path):
        yield from json_records(path, form)
        return
    for number, row in enumerate(table_rows(path, columns), 1):
        yield f"{path}:{number}", row


def json_records(path: Path, form: str) -> Iterator[tuple[str, object]]:
    """The value of each line of JSON in a file, after its place. form: what a line must be, for errors."""
    for number, line in enumerate(text_parts(path, "strict", by_line=True, remedy=""), 1):
        if line.strip():
            line = line.removeprefix("\ufeff")  # a mark in the middle, where files were joined
            try:
                yield f"{path}:{number}", parsed(line.removesuffix("\n"), form)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None


def parsed(line: str, form: str) -> object:
    """The value of a line of JSON. DataError says that it must be `form`, and how to make it so."""
    if line.strip() == "{":
        raise DataError(f"JSON over several lines; each line must be {form} (jq -c . FILE > NEW)")
    try:
        value = json.loads(line, object_pairs_hook=unique)
    except DataError:
        raise
    except RecursionError:
        raise DataError("JSON that is nested too deeply") from None
    except ValueError as error:
        if not line.lstrip().startswith("["):
            reason = "a number is too long"
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at character {error.pos + 1}"
            raise DataError(f"not JSON ({reason}); each line must be {form}") from None
        value = []  # an array that goes on in the next lines
    if isinstance(value, list):
        if value and all(isinstance(message, dict) and "role" in message for message in value):
            raise DataError('a list of messages; write {"messages": [...]} around it')
        raise DataError(f"a JSON array; each line must be {form} (jq -c '.[]' FILE > NEW)")
    return value

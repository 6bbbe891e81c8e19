"""Folders of data sets, as the Hugging Face hub and `datasets` lay them out.

Their names say what is what: data/train-00000-of-00002.parquet, train/data-00000-of-00001.arrow,
validation.jsonl, and README.md, which is a description.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hotlap.common.log import log_once
from hotlap.train.data.compressed import inner_ending
from hotlap.train.data.tables import TABLES, is_table

RECORDS = (*TABLES, ".jsonl")
WORDS = {  # in names, as `datasets` understands them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF)})(?![a-z])")
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\..*", re.DOTALL)
CACHE = re.compile(r"cache-.*\.arrow")  # what `datasets` keeps of a computation beside the data


def is_dataset(files: Sequence[Path], folder: Path) -> bool:
    """Whether a folder with these files is that of a data set: there are tables, or names that say what is to
    train.
    """
    found = [path for path in files if inner_ending(path) in RECORDS]
    return any(map(is_table, found)) or any(split_of(path, folder) == "train" for path in found)


def split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name says, or else the name of a folder that it is in."""
    for name in reversed(path.relative_to(folder).parts):
        if found := WORD.findall(name.lower()):
            return SPLIT_OF[found[0]]
    return None


def of_dataset(files: Sequence[Path], folder: Path, left_out: Counter[str]) -> list[Path]:
    """The files of a folder that are to train or validate: all of them, unless it is that of a data set.

    In one of those, its description is left out; and where names say what is to train, all that is neither
    for that nor to validate.
    """
    if not any(inner_ending(path) in RECORDS for path in files):
        return list(files)
    kept = [path for path in files if path != folder / "README.md" and not CACHE.fullmatch(path.name)]
    left_out["a data set's README.md, and caches of `datasets`"] += len(files) - len(kept)
    report_missing(kept)
    splits = {path: split_of(path, folder) for path in kept if inner_ending(path) in RECORDS}
    if "train" not in splits.values():
        return kept
    named = [path for path in kept if splits.get(path) in ("train", "validation")]
    left_out["files of the test split"] += sum(split == "test" for split in splits.values())
    left_out["files of no split"] += sum(splits.get(path) is None for path in kept)
    return named


def report_missing(files: Sequence[Path]) -> None:
    """Log what is there in part: train-00000-of-00002.parquet without train-00001-of-00002.parquet."""
    found = Counter(part.groups() for part in map(PART.fullmatch, map(str, files)) if part)
    for (name, total), count in found.items():
        if count < int(total):
            log_once(f"{name}: only {count} of its {int(total)} files are there")


def own_splits(files: Sequence[Path], folder: Path) -> list[tuple[Path, str | None]]:
    """The files of a folder, as `of_dataset` left them, with their splits: None, unless some are to validate
    and some to train.
    """
    splits = [split_of(path, folder) if inner_ending(path) in RECORDS else None for path in files]
    if not {"train", "validation"} <= set(splits):
        return [(path, None) for path in files]
    counts = Counter(splits)
    log_once(f"{folder}: its own splits: {counts['train']} files train, {counts['validation']} validate")
    return list(zip(files, splits, strict=True))

"""Which text files a path, a folder or a pattern names."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.log import log_once
from hotlap.train.data.compressed import inner_ending
from hotlap.train.data.dataset_folders import of_dataset

TEXT_FILES = (".txt", ".md", ".py", ".jsonl", ".parquet", ".arrow")  # what is read of a folder


def named_path(data: str) -> Path:
    """The path that a data string may be. `~` at its start is the home folder, if no file has that name."""
    if not data.strip():
        raise ValueError("the name of the data is empty; name a file, or see --help for what else it may be")
    return Path(data if os.path.lexists(data) else os.path.expanduser(data))


def text_files(data: str) -> list[Path]:
    """The file that `data` is, or the text files in that folder and the folders in it, sorted. What does not
    exist is a pattern (`*`, `?`, `[...]`, `**`), and names the files that match it, whatever their endings.

    What a folder or a pattern names beside them is logged, with counts. FileNotFoundError if no file is left.
    """
    path = named_path(data)
    left_out: Counter[str] = Counter()
    if path.is_dir():
        found = files_below(path, left_out)
    elif os.path.lexists(path):
        return [require_file(path)]
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        if "**" in data:  # which is meant to match them
            found = (path for path in found if not path.is_dir())
    files = distinct(sorted(found), left_out)
    if path.is_dir():
        files = of_dataset(files, path, left_out)
    rest = "; ".join(f"{what}: {count}" for what, count in left_out.items() if count)
    if not files:
        raise FileNotFoundError(
            f"no text files {'in' if path.is_dir() else 'match'} {data!r}" + (rest and f" ({rest})")
        )
    if rest:
        log_once(f"{data}: {len(files)} text files; left out {rest}")
    return files


def files_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The text files in a folder and the folders in it, also in those that links lead to."""
    entered = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if is_again(Path(place), entered):
            left_out["links to folders that are read already"] += 1
            folders.clear()
            continue
        left_out["hidden files and folders"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                ending = inner_ending(Path(name))
                if ending in TEXT_FILES:
                    yield Path(place, name)
                else:
                    left_out[f"files with the ending {ending}" if ending else "files without an ending"] += 1


def distinct(paths: Iterable[Path], left_out: Counter[str]) -> list[Path]:
    """The paths that are files, each file once."""
    files, seen = [], set()
    for path in paths:
        if path.is_dir():
            left_out["folders"] += 1
        elif not path.exists():
            left_out["broken links"] += 1
        elif not path.is_file():
            left_out["pipes, sockets or devices"] += 1
        elif is_again(path, seen):
            left_out["further names of the same files"] += 1
        else:
            files.append(path)
    return files


def is_again(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether this file or folder has been seen, under any name; from now on it has."""
    status = path.stat()
    identity = status.st_dev, status.st_ino
    again = identity in seen
    seen.add(identity)
    return again


def require_file(path: Path) -> Path:
    """The path, if it is a file that can be read more than once."""
    if not path.exists():
        link = path.is_symlink()
        what = f"is a link to {os.readlink(path)}, which leads nowhere" if link else "does not exist"
        raise FileNotFoundError(f"{path} {what}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(
            f"{path} is a pipe, socket or device, and data is read more than once; write it to a file"
        )
    return path


def refuse(error: OSError) -> None:
    raise error

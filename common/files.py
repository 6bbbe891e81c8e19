"""Files: the user's folders, hashes, JSON objects, and writes that leave the whole file or the old one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hotlap.common.errors import DataError


def cache_folder() -> Path:
    """The user's cache folder, for what can be downloaded or computed again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotlap"


def state_folder() -> Path:
    """The user's folder for what programs remember between sessions; it may not exist yet."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "hotlap"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_object(path: Path) -> dict:
    """The object in a JSON file. DataError names a file that holds anything else, or a name twice."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object but {str(found)[:40]!r}")
    return found


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, for json's object_pairs_hook. DataError if a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def write(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: a killed process or a full disk leaves the old file. Names of files
    keep the bytes that are not UTF-8.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_object(path: Path, fields: dict) -> None:
    """Write an object as a JSON file, as `write` does."""
    write(path, json.dumps(fields, indent=1) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that then replaces `path`. After an error nothing of it is left."""
    part = path.with_name(f".{os.getpid()}.{path.name}")  # two processes may write the same file
    try:
        with naming(path):
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Append to a UTF-8 text file, all of the text or nothing."""
    new = not path.exists()
    with naming(path), open(path, "ab", buffering=0) as file:
        end, left = file.tell(), text.encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # of a device
                file.truncate(end)
                if new:
                    path.unlink()
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to the error of a write, such as on a full disk, which does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Flush a file or folder to disk. Windows flushes no folders, and only files that may be written."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

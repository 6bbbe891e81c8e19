"""Files: the cache folder, hashes, and writing that a crash cannot spoil."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's folder for what can be downloaded, computed or measured again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotlap"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all: a process that is killed leaves what was there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # so that two processes may write the same file
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

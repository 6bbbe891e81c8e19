"""Files: the cache folder, hashes and atomic writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder, for what can be downloaded or computed again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotlap"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: a killed process leaves the old file. Names of files keep the bytes
    that are not UTF-8.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write the same file
    part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    part.replace(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

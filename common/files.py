"""Files: the cache folder, hashes, atomic writes, and the lines of files as people's editors save them."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError

LONGEST_LINE = 1 << 26  # characters; a longer line is refused, so that memory does not grow with the file
BYTE_ORDER_MARKS = {  # but for UTF-8's; UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # how such files begin


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
    """Write a UTF-8 text file atomically: a killed process leaves the old file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write the same file
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path) -> None:
    """Raise DataError if an existing path is a folder, or a pipe or device, which can be read only once."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a pipe or a device, which cannot be read twice; save it in a file")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, without their ends, after their numbers from 1.

    The text is UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one. Lines end as on any
    system. DataError names the line that is other text, or longer than LONGEST_LINE.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    number = 0
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding:
        errors = "strict"
    elif b"\0" in head or head.startswith(COMPRESSED):
        raise DataError(f"{path} is binary or compressed; unpack it, or name a text file")
    else:
        encoding, errors = "utf-8-sig", "surrogateescape"  # what is not UTF-8 is found in its line
    with open(path, encoding=encoding, errors=errors) as file:
        try:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}:{number}: a line of over {LONGEST_LINE:,} characters; split it")
                line.encode()
                yield number, line.removesuffix("\n")
        except UnicodeEncodeError as error:
            wrong = ord(error.object[error.start]) - 0xDC00
            raise DataError(
                f"{path}:{number}: byte {wrong:#x} at character {error.start + 1} is not UTF-8; save the "
                "file as UTF-8"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not {encoding.upper()} after line {number} ({error.reason}); save it as UTF-8"
            ) from None

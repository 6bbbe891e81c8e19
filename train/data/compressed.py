"""Files that are compressed by gzip or zstd, read as what is in them.

What a few kilobytes expand to may fill memory and disk, so a file is read in blocks, and one that expands far
more than text does is refused.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hotlap.common.errors import DataError

BLOCK = 1 << 20  # bytes read at once
ENDINGS = {".gz": "gzip", ".zst": "zstd"}
SIGNATURES = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd"}
SIGNATURES |= {bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd" for i in range(16)}  # pzstd's first frame
NEEDS_PYARROW = "needs pyarrow: pip install 'hotlap[data]'"
MOST_TIMES = 200  # text shrinks to a third or a tenth, repetitive logs to a hundredth
FREE = 1 << 26  # bytes, up to which a file may expand as it likes


def inner_ending(path: Path) -> str:
    """The ending of what a file holds, in lower case: `.jsonl` of a.jsonl and of A.JSONL.gz."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in ENDINGS else ending


def compression(head: bytes) -> str | None:
    """What compressed a file that begins like this."""
    return next((name for start, name in SIGNATURES.items() if head.startswith(start)), None)


@contextmanager
def expanded(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes in a file, which are decompressed if they are compressed, whatever the file's name.

    DataError for a file that is not compressed but named so, is compressed twice, or (as it is read) is
    damaged, cut short, or a bomb.
    """
    with open(path, "rb") as file:
        kind = compression(file.read(4))
        file.seek(0)
        if kind is None:
            if path.suffix.lower() in ENDINGS and file.read(1):
                name = ENDINGS[path.suffix.lower()]
                raise DataError(f"{path} is not compressed by {name}, as its name says; rename it")
            file.seek(0)
            yield file
            return
        inner = io.BufferedReader(Expansion(path, file, kind), BLOCK)
        if twice := compression(inner.peek(4)):
            raise DataError(f"{path} is compressed twice ({twice} inside of {kind}); decompress it once")
        yield inner


def stream(file: BinaryIO, kind: str) -> BinaryIO:
    """What a compressed file expands to, over all its members or frames, decompressed as it is read."""
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    try:
        from pyarrow import CompressedInputStream
    except ImportError as error:
        raise ImportError(f"reading {file.name}, compressed by zstd, {NEEDS_PYARROW}") from error
    return CompressedInputStream(file, "zstd")  # refuses windows of more than 128 MB


class Expansion(io.RawIOBase):
    """A compressed file as the bytes in it. Reading raises DataError where it is damaged or a bomb."""

    def __init__(self, path: Path, file: BinaryIO, kind: str) -> None:
        self.path, self.file, self.kind = path, file, kind
        self.stream = stream(file, kind)
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            block = self.stream.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's, not the decompressor's
                raise
            raise DataError(self.damage(error)) from None
        self.count += len(block)
        check_growth(self.path, self.count, self.file.tell())
        buffer[: len(block)] = block
        return len(block)

    def damage(self, error: Exception) -> str:
        place = f"{self.path}, after {self.count:,} bytes of what is in it,"
        if "too much memory" in str(error):
            return f"{place} needs a window of more than 128 MB; compress it again, without zstd's --long"
        if isinstance(error, EOFError) or "Truncated" in str(error):
            return f"{place} is cut short; copy or download it again"
        return f"{place} is damaged ({self.kind}: {error}); copy or download it again"


def check_growth(path: Path, count: int, size: int) -> None:
    """Raise DataError if `count` bytes were in `size` bytes of a file, as in no file of text."""
    if count > max(FREE, MOST_TIMES * size):
        raise DataError(
            f"{path} expands more than {MOST_TIMES} times, to over {FREE >> 20} MB, which text does not; if "
            "you trust it, decompress it (a table: save it as JSON Lines)"
        )

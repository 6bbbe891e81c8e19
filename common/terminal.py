"""Text for a terminal. Names of files and tensors, exceptions and answers may hold anything."""

from __future__ import annotations

import io
import os
from typing import Any

KEPT = (ord("\t"), ord("\n"))
CONTROLS = (*range(0x20), *range(0x7F, 0xA0))  # C0, DEL and C1
DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # change the writing direction
SURROGATES = range(0xD800, 0xE000)  # alone: of a file name that is not UTF-8
SHOWN: dict[int, str | None] = {
    **{c: None for c in (*CONTROLS, *DIRECTIONS) if c not in KEPT},
    **dict.fromkeys(SURROGATES, "\ufffd"),
    0x2028: "\n",  # a line separator
    0x2029: "\n",
}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def printable(text: str) -> str:
    """text without what controls the terminal or changes the writing direction. Lone surrogates, which
    cannot be encoded, become U+FFFD.
    """
    return text.translate(SHOWN)


def dimmed(text: str, stream: Any) -> str:
    """text in a dim colour if the stream is a terminal that shows colours and NO_COLOR is not set."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return f"{DIM}{text}{PLAIN}" if wanted and stream is not None and stream.isatty() else text


def lenient(stream: Any) -> None:
    """Let a stream write `?` for what its encoding lacks, and read U+FFFD for what is not in it."""
    if isinstance(stream, io.TextIOWrapper):  # notebooks have others
        stream.reconfigure(errors="replace")

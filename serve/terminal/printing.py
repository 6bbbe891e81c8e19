"""What a chat prints: answers to standard output, everything else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hotlap.common.terminal import dimmed, printable


def note(text: str) -> None:
    """What the program says, in brackets."""
    inform(f"[{text}]")


def inform(text: str) -> None:
    """What the program says, as it is."""
    print(dimmed(printable(text), sys.stderr), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    print(printable(f"error: {text}"), file=sys.stderr, flush=True)


def shortened(text: str, length: int = 60) -> str:
    """text on one line of at most `length` characters."""
    text = " ".join(text[: 20 * length].split())
    return text if len(text) <= length else text[: length - 3] + "..."


def say(pieces: Iterator[str]) -> bool:
    """Print an answer as it comes; False if there is none. Ctrl-C stops the answer, not the program."""
    spaces, said = "", False
    try:
        for piece in pieces:
            text = spaces + printable(piece)
            if text.strip():
                print(text, end="", flush=True)
                spaces, said = "", True
            else:
                spaces = text  # shown if anything follows
        print("" if said else "[no answer]", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]", flush=True)
        return True
    except ValueError as error:
        if said:
            print(flush=True)
        complain(str(error))
        return False
    return said

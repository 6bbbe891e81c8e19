"""Errors that users can cause, and how a program shows them: one line and an exit code."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable

# as in sysexits.h
BUG, BAD_DATA, NO_INPUT, CANNOT_CREATE, INPUT_OUTPUT, TRY_AGAIN = 70, 65, 66, 73, 74, 75


class DataError(ValueError):
    """A file or record that cannot be used: says which, what is wrong, and what to try."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it was."""


class RankLost(Exception):
    """Another process of the run failed or does not answer; says which, and what it said."""


EXIT_CODES: dict[type[BaseException], int] = {  # the first that fits
    Interrupted: 130,
    KeyboardInterrupt: 130,
    RankLost: TRY_AGAIN,
    DataError: BAD_DATA,
    ValueError: 2,
    FloatingPointError: 1,
    ImportError: 1,
    FileNotFoundError: NO_INPUT,
    FileExistsError: CANNOT_CREATE,
    OSError: INPUT_OUTPUT,
}


def known(name: str, names: object, what: str) -> str:
    """name where it is one of names; else a ValueError with the nearest ones."""
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    raise ValueError(f"unknown {what}: {name!r}; {hint}")


def guarded(action: Callable[[], int | None], debug: bool) -> int:
    """Run action, and return its exit code; an error becomes `error: ...` on one line, or with debug a
    traceback.
    """
    try:
        return action() or 0
    except BrokenPipeError:  # who read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BUG)
        if code == BUG:
            text = f"{type(error).__name__}: {text} (a bug; --debug shows where)"
        rank = int(os.environ.get("RANK", 0))  # of torchrun's processes
        if not isinstance(error, Interrupted):
            text = f"rank {rank}: error: {text}" if rank else f"error: {text}"
        if not (rank and isinstance(error, Interrupted)):
            print(text, file=sys.stderr)
        return code

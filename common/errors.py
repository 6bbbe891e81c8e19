"""Errors that users can cause, shown as one line with an exit code."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable

from hotlap.common.terminal import printable

# as in sysexits.h
BUG, BAD_DATA, NO_INPUT, CANNOT_CREATE, INPUT_OUTPUT, TRY_AGAIN = 70, 65, 66, 73, 74, 75


class DataError(ValueError):
    """A file or record is unusable. The message says which, what is wrong, and what to try."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved a checkpoint."""


class RankLost(Exception):
    """Another rank failed or does not respond. The message says which, and its error."""


EXIT_CODES: dict[type[BaseException], int] = {  # the first match counts
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
    """Return name if it is one of names; else raise a ValueError that suggests the closest one."""
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    raise ValueError(f"unknown {what}: {name!r}; {hint}")


def guarded(action: Callable[[], int | None], debug: bool) -> int:
    """Run action and return its exit code. An error is printed as one line, or raised if debug is set."""
    try:
        return action() or 0
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BUG)
        if code == BUG:
            text = f"{type(error).__name__}: {text} (a bug; --debug shows the traceback)"
        rank = int(os.environ.get("RANK", 0))  # under torchrun
        if not isinstance(error, Interrupted):
            text = f"rank {rank}: error: {text}" if rank else f"error: {text}"
        if not (rank and isinstance(error, Interrupted)):
            print(printable(text), file=sys.stderr)
        return code

"""Errors that users can cause, shown as one line with an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable

from hotlap.common.terminal import printable

# as in sysexits.h
BAD_DATA, NO_INPUT, BUG, NO_MEMORY, CANNOT_CREATE, INPUT_OUTPUT, TRY_AGAIN = 65, 66, 70, 71, 73, 74, 75
INTERRUPTED = "interrupted"  # what Ctrl-C prints
FULL = (errno.ENOSPC, errno.EDQUOT)
WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


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
    MemoryError: NO_MEMORY,
    RecursionError: BAD_DATA,
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch had not enough memory, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for a GPU
        return True
    said = ("not enough memory", "can't allocate memory", "out of memory")  # torch on a CPU, and CUDA
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def explained(error: BaseException) -> tuple[str, int]:
    """An error on one line, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, EXIT_CODES[KeyboardInterrupt]
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error) and not isinstance(error, MemoryError):
        error = MemoryError(text)
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BUG)
    if type(error).__module__ == "pyo3_runtime":
        text = f"a library in Rust (tokenizers, tiktoken or safetensors) failed: {text}"
    elif code == NO_MEMORY and "; " not in text:  # of Python or a library: it says nothing to try
        text = f"not enough memory: {text}; ask for less, such as fewer rows, a shorter context or less data"
    elif isinstance(error, RecursionError):
        text = f"something in a file is nested too deeply ({text}); --debug shows where"
    elif isinstance(error, OSError) and error.errno in FULL:
        where = error.filename or "the output"
        text = f"the disk is full: cannot write {where} ({error.strerror}); free up space"
    elif isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
        text = f"{error.filename}: {error.strerror}; name another file or folder"
    elif code == BUG:
        text = f"{type(error).__name__}: {text} (a bug; --debug shows the traceback)"
    return text, code


def guarded(action: Callable[[], int | None], debug: bool) -> int:
    """Run action and return its exit code. An error is printed as one line, or raised if debug is set."""
    try:
        try:
            return action() or 0
        finally:
            flush_output()
    except BrokenPipeError:  # the reader of our output has exited
        return 141
    except SystemExit:  # tyro has printed help or a mistake
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is not an Exception
        if debug:
            raise
        text, code = explained(error)
        rank = int(os.environ.get("RANK", 0))  # under torchrun
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        if not stopped:
            text = f"rank {rank}: error: {text}" if rank else f"error: {text}"
        if not (rank and stopped):
            print(printable(text), file=sys.stderr)
        return code


def flush_output() -> None:
    """Write out standard output. What cannot be written is an error now; Python, when it exits, would print
    another.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise

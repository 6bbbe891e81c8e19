"""What an exception becomes: one line and an exit code."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hotlap.common.errors import DataError, guarded

PanicException = type(
    "PanicException", (BaseException,), {"__module__": "pyo3_runtime"}
)  # as by Rust libraries


def deep() -> None:
    deep()


def too_large_for_numpy() -> None:
    np.empty(1 << 50)


def too_large_for_torch() -> None:
    torch.empty(1 << 60)


def raises(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "parts"),
    [
        (raises(ValueError("a is 1;\n  it must be 2")), 2, ["error: a is 1; it must be 2"]),
        (raises(DataError("a.json is empty")), 65, ["error: a.json is empty"]),
        (raises(MemoryError("8 rows are too many; try 4")), 71, ["error: 8 rows are too many; try 4"]),
        (raises(MemoryError()), 71, ["error: not enough memory", "ask for less"]),
        (too_large_for_numpy, 71, ["error: not enough memory: Unable to allocate", "ask for less"]),
        (too_large_for_torch, 71, ["error: not enough memory", "ask for less"]),
        (raises(torch.OutOfMemoryError("on the GPU")), 71, ["error: not enough memory: on the GPU"]),
        (raises(RuntimeError("CUDA error: out of memory")), 71, ["error: not enough memory"]),
        (deep, 65, ["error: ", "nested too deeply", "--debug"]),
        (raises(PanicException("index out of range")), 70, ["a library in Rust", "index out of range"]),
        (raises(OSError(errno.ENOSPC, "No space left on device", "a.bin")), 74, ["disk is full", "a.bin"]),
        (raises(KeyError("a")), 70, ["error: KeyError: 'a' (a bug; --debug shows the traceback)"]),
        (raises(KeyboardInterrupt()), 130, ["interrupted"]),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(action, code, parts, capsys):
    assert guarded(action, debug=False) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_with_debug_it_is_raised():
    with pytest.raises(PanicException):
        guarded(raises(PanicException("x")), debug=True)


def test_the_exit_of_a_parser_of_flags_passes():
    with pytest.raises(SystemExit):
        guarded(raises(SystemExit(2)), debug=False)


def guarded_apart(action: str, stdout: int) -> tuple[int, str]:
    """The exit code and standard error of a process that runs a statement in `guarded`."""
    code = (
        f"from hotlap.common.errors import guarded\ndef action():\n    {action}\n"
        "raise SystemExit(guarded(action, debug=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("action", ["print('x')", "print('x'); raise SystemExit(0)", "print('x' * 100_000)"])
def test_a_reader_that_has_exited_ends_a_command_without_a_word(action):
    reading, writing = os.pipe()
    os.close(reading)
    assert guarded_apart(action, writing) == (141, "")
    os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_is_one_error():
    with open("/dev/full", "w") as full:
        code, said = guarded_apart("print('x')", full.fileno())
    assert code == 74 and said.count("\n") == 1 and "the disk is full: cannot write the output" in said

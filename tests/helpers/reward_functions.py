"""Rewards, good and bad ones, as a user's module may have them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np


class Shaped:
    """As a tensor of more than one dimension, which can still be converted if it has one element."""

    shape = (1,)

    def __float__(self):
        return 1.0


VALUES = {
    "nan": float("nan"), "infinity": float("inf"), "None": None, "string": "1", "list": [1.0],
    "complex": 1j, "shape": Shaped(), "array": np.ones(3), "huge": 10**400, "large": 1e10,
}  # fmt: skip


def length(answer: str, record: dict) -> float:
    return len(answer) / record.get("most", 10)


def matches(answer: str, record: dict) -> bool:
    return answer == record["answer"]


def scalar(answer: str, record: dict) -> np.float32:
    return np.float32(0.5)


def slow(answer: str, record: dict) -> float:
    time.sleep(0.05)
    return 1.0


def behaves(answer: str, record: dict) -> float:
    """Does what the answer says."""
    if answer in VALUES:
        return VALUES[answer]
    if answer == "raise":
        raise RuntimeError(f"first line\nsecond line of {record['number']}")
    if answer == "exit":
        sys.exit(3)
    if answer == "die":
        os._exit(4)
    if answer == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if answer == "fork":
        os.fork()
    if answer == "sleep":
        time.sleep(3600)
    if answer == "loop":
        while True:
            pass
    if answer == "stuck in C":  # and holds Python's lock
        ctypes.PyDLL(None).sleep(3600)
    if answer == "catch all":
        while True:
            with suppress(BaseException):
                time.sleep(3600)
    if answer == "start a process":
        started = subprocess.Popen(["sleep", "3600"])
        Path(record["file"]).write_text(str(started.pid))
        started.wait()
    if answer == "print":
        print("x" * 100_000)
        os.write(1, b"y" * 100_000)
    return 1.0


def of_one(answer):
    return 0.0


NOT_CALLABLE = 3

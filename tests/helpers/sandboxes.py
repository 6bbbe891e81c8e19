"""The tiers of the sandbox that work on this machine, and programs that try to get out of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from hotlap.model import sandbox, sandbox_child

TIERS = ("bubblewrap", "landlock")
ATTEMPT = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        result = action()
    except (OSError, ValueError) as error:
        print("refused")
    else:
        print("escaped:", result)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""


@cache
def tier(name: str) -> sandbox.Sandbox | str:
    """A sandbox of this tier, or why it does not work here."""
    try:
        return sandbox._tier(name)
    except (OSError, ValueError) as error:
        return str(error)


def needed(name: str) -> sandbox.Sandbox:
    """A sandbox of this tier. Skips the test where the machine lacks what it needs; else it must work."""
    found = tier(name)
    if isinstance(found, str):
        assert not _offers(name), f"this machine offers {name}, and the sandbox does not work: {found}"
        pytest.skip(f"NOT TESTED: the sandbox's tier {name} does not work here: {found}")
    return found


@cache
def _offers(name: str) -> bool:
    """Whether this machine has Landlock, or lets bubblewrap make namespaces."""
    try:
        if name == "landlock":
            return sandbox_child.landlock_version(ctypes.CDLL(None, use_errno=True)) > 0
        command = [sandbox._bubblewrap(), "--unshare-all", "--ro-bind", "/", "/", "true"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except (OSError, ValueError):
        return False


def escapes(box: sandbox.Sandbox, *actions: str, before: str = "", seconds: float = 10) -> list[str]:
    """What each action, an expression, came to, when a program in the sandbox tried it."""
    attempts = "\n".join(f"attempt(lambda: {action})" for action in actions)
    outcome = box.run(f"{ATTEMPT}\n{before}\n{attempts}", seconds)
    assert outcome.ok, outcome
    return outcome.text.splitlines()


def children() -> set[int]:
    """Ids of this process's children, zombies included, and of orphans if it is a subreaper."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == os.getpid():
            found.add(int(file.parent.name))
    return found

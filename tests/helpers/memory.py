"""The memory that a piece of code needs, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest


def peak_memory(code: str) -> int:
    """The most bytes that a fresh Python held while it ran this code, mapped files included."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how much memory a process has held")
    report = "\nprint(next(row for row in open('/proc/self/status') if row.startswith('VmHWM')).split()[1])"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024

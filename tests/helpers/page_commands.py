"""The web page as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_page(folder: Path, *flags: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`hotlap web`, with conversations in `folder`. Yields its address and process."""
    command = [sys.executable, "-m", "hotlap.cli", "web", "--port", "0", "--folder", str(folder), *flags]
    process = subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("page "), line + process.stdout.read()
        yield line.split()[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, process.stdout.read()

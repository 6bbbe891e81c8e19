"""The process of a program in the sandbox, seen from its parent: its output, its limits, and its end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

OUTPUT_BYTES = 64 * 1024
WRITTEN_BYTES = 16 * 1024 * 1024  # by all writes to files and output together
SPACE_BYTES = 2 * WRITTEN_BYTES  # of files: some file systems reserve as much again for one that grows
MAX_FILES, MAX_THREADS = 1000, 64
WATCH_SECONDS = 0.01  # between two looks at what is written
FOLDER = "/sandbox"  # the program's, within bubblewrap's namespace


class Program:
    """The process of a program, from its parent's side. It is gone when the context ends."""

    def __init__(self, process: subprocess.Popen, bwrap: bool, folder: Path) -> None:
        self.process, self.bwrap, self.folder = process, bwrap, folder
        self.id = None if bwrap else process.pid  # of the process that runs Python

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError, ValueError, subprocess.TimeoutExpired):
            if self.process.poll() is None:
                os.kill(self._find(), signal.SIGKILL)  # bubblewrap waits for it, and ends then
                self.process.wait(timeout=1)
        with suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def _find(self) -> int:
        """The process id. ValueError or OSError if it is not there yet, or not any more."""
        if self.id is None:
            parent = self.process.pid
            self.id = int(Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8"))
        return self.id

    def watch(self, end: float, cancelled: Callable[[], bool]) -> tuple[bytes, str]:
        """Read output until the process ends, breaks a limit, or is cancelled. What was read, and which."""
        output = bytearray()
        pipe = self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        is_open, look = True, 0.0
        while is_open or self.process.poll() is None:
            now = time.monotonic()
            if now >= end:
                return bytes(output), "timeout"
            if now >= look:
                if reason := "cancelled" if cancelled() else self._broken_limit():
                    return bytes(output), reason
                look = now + WATCH_SECONDS
            if not is_open:
                time.sleep(0.001)
            elif waiting.poll(1000 * min(WATCH_SECONDS, end - now)):
                part = os.read(pipe, OUTPUT_BYTES)
                output += part
                is_open = bool(part)
                if len(output) > OUTPUT_BYTES:
                    return bytes(output), "output"
        return bytes(output), ""

    def _broken_limit(self) -> str:
        with suppress(OSError, ValueError):
            process = Path(f"/proc/{self._find()}")
            counts = dict(
                line.split(":") for line in (process / "io").read_text(encoding="utf-8").splitlines()
            )
            if int(counts["wchar"]) > WRITTEN_BYTES:
                return "files"
            if (process / "task").stat().st_nlink - 2 > MAX_THREADS:
                return "threads"
            # the filter lets it make no folder and no link, so that there are no others
            with os.scandir(f"{process}/root{FOLDER}" if self.bwrap else self.folder) as entries:
                files = [entry.path for entry in islice(entries, MAX_FILES + 1)]
            if len(files) > MAX_FILES:
                return "files"
            # in memory, a file system also fills holes that are only read; deleted files stay while open
            opened = [f"{process}/fd/{number}" for number in os.listdir(process / "fd")]
            if sum(map(_space, files)) + sum(_space(path, deleted=True) for path in opened) > SPACE_BYTES:
                return "files"
        return ""


def _space(path: str, deleted: bool = False) -> int:
    """Bytes that a file takes, or 0 if it is gone, or is not deleted and should be."""
    with suppress(OSError):
        status = os.stat(path)
        return 0 if deleted and status.st_nlink else 512 * status.st_blocks
    return 0

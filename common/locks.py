"""Locks on open files, between processes. When a process ends, however it does, its locks end."""

from __future__ import annotations

import os
import time
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The place of the byte that is locked on Windows, which lets nobody else read what is locked.
BEYOND = 1 << 30
PAUSE = 0.05  # seconds between two tries on Windows


def lock(file: IO, wait: bool) -> None:
    """Lock a file until it is closed. wait: for who holds the lock; without it, raises BlockingIOError."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while not _lock_byte(file.fileno()):
        if not wait:
            raise BlockingIOError(f"{file.name} is locked")
        time.sleep(PAUSE)


def _lock_byte(descriptor: int) -> bool:
    """Try to lock a byte that no file has. On Windows."""
    import msvcrt

    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)
    return True

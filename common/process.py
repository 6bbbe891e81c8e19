"""What a process sets once: to compute on a CPU, and to end with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

# Parameters of glibc's mallopt: free memory at the heap's end beyond the first is returned to the system, and
# allocations above the second are mapped on their own, and returned when they are freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def wait_asleep() -> None:
    """Before torch is imported: let OpenMP's threads sleep while they wait for each other, unless the user's
    environment says how they wait.

    By default they spin for milliseconds, which takes a core from the thread that they wait for if other
    processes use the machine. With one such process on two cores, a training step of the demo's model took
    0.4 s instead of 2 s (Intel Xeon, family 6, model 207); without one, the difference was within 5 %.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def c_function(name: str) -> Callable | None:
    """A function of this process's C library. None if it has no such function, and on Windows."""
    return None if sys.platform == "win32" else getattr(ctypes.CDLL(None), name, None)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of asking the system for zeroed
    pages again in each step. No effect with another C library.
    """
    set_option = c_function("mallopt")
    if set_option:
        set_option(MMAP_THRESHOLD, 1 << 30)
        set_option(TRIM_THRESHOLD, (1 << 31) - 1)


def end_with_parent() -> None:
    """Get SIGTERM when the thread that started this process ends, even if it is killed. Only on Linux."""
    control = c_function("prctl")
    if control:
        control(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def end_session(process: subprocess.Popen) -> None:
    """Kill a process that was started with start_new_session, and all that it has started; on Windows, which
    has no sessions, the process alone.
    """
    with suppress(ProcessLookupError):  # it has ended by itself
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()

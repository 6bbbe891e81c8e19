"""Faults for tests: with FAULT="POINT:RANK:STEP:ACTION" a rank fails at a named point; else nothing happens.

POINT names a call of `fault`. ACTION is kill9, stop (until it is continued or killed), raise, sleep=SECONDS,
enospc, or a word that the caller acts on: nan, grow, flip. Several faults are separated by commas. After
torchrun has restarted the ranks nothing happens any more.
"""

from __future__ import annotations

import errno
import os
import signal
import time


def fault(point: str, rank: int, step: int) -> str | None:
    """Fail here, where the environment says so; the word of an action that the caller has to carry out."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    for entry in filter(None, os.environ.get("FAULT", "").split(",")):
        where, whose, when, action = entry.split(":")
        if (where, int(whose), int(when)) != (point, rank, step):
            continue
        if action == "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "raise":
            raise ValueError(f"injected at {point}, step {step}")
        elif action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
        else:
            return action
    return None

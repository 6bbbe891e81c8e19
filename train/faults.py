"""Fault injection for tests: FAULT="POINT:RANK:STEP:ACTION" makes a rank fail at a named point.

POINT names a call of `fault`. ACTION is sigkill, sigstop, sigterm, raise, sleep=SECONDS, enospc, or a word
that the caller acts on: nan, grow, flip. Separate several faults with commas. Faults are off after torchrun
has restarted the ranks, and without the variable.
"""

from __future__ import annotations

import errno
import os
import signal
import time


def fault(point: str, rank: int, step: int) -> str | None:
    """Fail here if the environment says so. Returns the action if the caller has to carry it out."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    for entry in filter(None, os.environ.get("FAULT", "").split(",")):
        where, whose, when, action = entry.split(":")
        if (where, int(whose), int(when)) != (point, rank, step):
            continue
        if action in ("sigkill", "sigstop", "sigterm"):
            os.kill(os.getpid(), signal.Signals[action.upper()])
        elif action == "raise":
            raise ValueError(f"injected at {point}, step {step}")
        elif action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
        else:
            return action
    return None

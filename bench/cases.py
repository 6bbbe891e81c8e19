"""What benchmarks share around timing.py: marks within a step, time limits, failures, and a fresh start."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Iterator

import torch

from hotlap.common.errors import is_out_of_memory
from hotlap.common.timing import synchronize

# Notes of rows without a time.
NO_TIME = "skipped: no time left"
OUT_OF_MEMORY = "out of memory; give fewer --rows"
FAILED = "does not run:"


@contextlib.contextmanager
def compiled_or_failed(**options: bool) -> Iterator[None]:
    """What reaches torch.compile's limit of variants fails, instead of being timed uncompiled. options: of
    AOTAutograd.
    """
    import torch._functorch.config

    dynamo = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with dynamo, torch._functorch.config.patch(**options):
        yield


class Stopwatch:
    """Seconds between marks in a device's work. Only reading them waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        synchronize(self.device)
        pairs = itertools.pairwise(self.marks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


class Budget:
    """A time limit for a sequence of cases: start one only if there is time for one like the last."""

    def __init__(self, minutes: float):
        """0 minutes: no limit."""
        if not 0 <= minutes < math.inf:
            raise ValueError(f"minutes={minutes} must be 0 (no limit) or more")
        self.end = time.monotonic() + 60 * minutes if minutes else math.inf
        self.began: float | None = None

    def fits(self) -> bool:
        """Whether to start a case now. Call it once before each case."""
        now = time.monotonic()
        last = 0 if self.began is None else now - self.began
        self.began = now
        return now + last < self.end


def start_afresh(device: torch.device) -> None:
    """Drop compiled code, which counts towards torch.compile's limit per function, and free memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    """The note of a row for an error."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{FAILED} {' '.join(str(error).split())[:120] or type(error).__name__}"

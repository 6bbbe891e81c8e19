"""As many threads as the work is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# A thread that gets less waits longer for the others than it works: on two cores of a Xeon (family 6, model
# 207), a decoding step of 30 to 40 MFLOP took as long on one thread as on two, one of 250 MFLOP 1.7 times as
# long.
THREAD_FLOPS = 50e6


@contextlib.contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Run torch's operations on at most one thread for each THREAD_FLOPS."""
    most = torch.get_num_threads()
    torch.set_num_threads(max(1, min(most, int(flops / THREAD_FLOPS))))
    try:
        yield
    finally:
        torch.set_num_threads(most)

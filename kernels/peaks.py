"""Measured ceilings of a device: memory bandwidth of a copy, and FLOP/s of a large matmul."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hotlap.common.timing import Clock, measure
from hotlap.kernels.dispatch import fast_dtype


@dataclass(frozen=True)
class Ceilings:
    """Measured bytes/s of a copy (read plus write), and FLOP/s of a large matmul in `dtype`."""

    copy: float
    matmul: float
    dtype: str

    def in_tera(self) -> tuple[float, float]:
        """TB/s and TFLOP/s."""
        return self.copy / 1e12, self.matmul / 1e12


def measure_ceilings(device: torch.device, clock: Clock = time.perf_counter) -> Ceilings:
    """Time a copy far larger than any cache, and a matmul of random matrices (zeros would run faster).

    clock: of a CPU. With time.process_time, what its cores reach while they work, whatever else runs on them.
    """
    large = device.type == "cuda"
    source = torch.randn((1 << 28) if large else (1 << 25), device=device)
    target = torch.empty_like(source)
    dtype, size = fast_dtype(device.type), 8192 if large else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timings = measure(
        {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(a, b, out=out)},
        device,
        clock=clock,
    )
    copied = 2 * source.numel() * source.element_size()
    by_thread = device.type == "cpu" and clock is time.process_time  # which adds the seconds of all of them
    workers = torch.get_num_threads() if by_thread else 1
    return Ceilings(
        workers * copied / timings["copy"].median,
        workers * 2 * size**3 / timings["matmul"].median,
        str(dtype).removeprefix("torch."),
    )

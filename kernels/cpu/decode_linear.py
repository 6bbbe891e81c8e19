"""Products of a few rows on CPUs: the operation of ../decode_linear.py, for float32 and bfloat16."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.cpu.library import run
from hotlap.kernels.cpu.measured import fastest
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import EPS, rms_norm

WIDEST = 1024  # measured of all wider models, too


def forward(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x0: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    norm: bool,
    squared_relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), a x + b x0 and the gates (..., K); what is not asked for is empty."""
    (N, D), rows = weight.shape, x.shape[:-1]
    K, G = (0, 0) if gate is None else gate.shape
    y = torch.empty((*rows, N), dtype=x.dtype)
    total = torch.empty((0,) if x0 is None else x.shape, dtype=x.dtype)
    gates = torch.empty((0,) if gate is None else (*rows, K), dtype=x.dtype)
    x, x0, gate, residual = (t if t is None else t.contiguous() for t in (x, x0, gate, residual))  # small
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if a is not None:
        a, b = a.to(x.dtype), b.to(x.dtype)
    run(
        "decode_linear" if scales is None else "decode_linear_int8", x.dtype,
        x, a, b, x0, weight, None if scales is None else scales.contiguous(), gate, residual, y, total, gates,
        weight.stride(0), math.prod(rows), N, D, K, G, int(norm), int(squared_relu), EPS,
    )  # fmt: skip
    return y, total, gates


@functools.cache
def most_rows(dtype: torch.dtype, width: int) -> int:
    """Up to how many rows a model of this width is faster with these products than with torch's: 1, 4 or 16.

    One row is bound by memory. For more, torch may use instructions for matrices, which C cannot say.
    """
    width, name = min(width, WIDEST), str(dtype).removeprefix("torch.")

    def prepare(rows: int, fused: bool) -> Callable[[], object]:
        x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        if fused:
            return lambda: forward(x, weight, None, None, None, None, None, None, True, True)
        return lambda: relu2(F.linear(rms_norm(x), weight))

    for rows in (16, 4):
        candidates = {by: functools.partial(prepare, rows, by == "c") for by in ("c", "torch")}
        if fastest(f"products of {rows} rows of a {name} model {width} wide", candidates) == "c":
            return rows
    return 1

"""Products of a few rows on CPUs: the operation of ../decode_linear.py, for float32 and bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run
from hotlap.kernels.rms_norm import EPS


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

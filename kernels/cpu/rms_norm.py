"""RMSNorm on CPUs: the operations of ../rms_norm.py without a weight, for float32 and bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run
from hotlap.kernels.tiles import as_rows


def _float32(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float()


def forward_plain(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, None, None, eps)
    return y, rstd


def forward_residual(
    x: Tensor, residual: Tensor, a: Tensor | None, b: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, a, b, eps)


def _forward(x: Tensor, residual: Tensor | None, a: Tensor | None, b: Tensor | None, eps: float):
    """y, the sum (where there is a residual), and the reciprocal norms (M,)."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(M, dtype=torch.float32)
    if M:
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        a, b = _float32(a), _float32(b)
        strides = rows.stride(0), 0 if added is None else added.stride(0)
        run("rms_norm", x.dtype, rows, added, a, b, y, total, rstd, *strides, M, N, eps)
    return y, total, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight (none), residual, and of a and b in one float32 tensor (2,)."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    dx, dresidual = torch.empty(x.shape, dtype=x.dtype), x.new_empty(x.shape if a is not None else 0)
    shares = torch.empty(M if a is not None else 0, 2, dtype=torch.float32)
    if M:
        dy, x = as_rows(dy), as_rows(x)
        dtotal, residual = (None if part is None else as_rows(part) for part in (dtotal, residual))
        a, b = _float32(a), _float32(b)
        strides = (0 if part is None else part.stride(0) for part in (dy, dtotal, x, residual))
        run(
            "rms_norm_backward", x.dtype,
            dy, dtotal, x, rstd, residual, a, b, dx, dresidual, shares, *strides, M, N,
        )  # fmt: skip
    return dx, x.new_empty(0), dresidual, x.new_empty(0, dtype=torch.float32) if a is None else shares.sum(0)

"""RMSNorm on CPUs: the operations of ../rms_norm.py, for float32 and bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run
from hotlap.kernels.tiles import as_rows

ROWS = 32  # whose gradients of the weight are summed one after the other


def _float32(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.float().contiguous()


def forward_plain(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, None, None, weight, eps)
    return y, rstd


def forward_residual(
    x: Tensor, residual: Tensor, a: Tensor | None, b: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, a, b, weight, eps)


def _forward(
    x: Tensor, residual: Tensor | None, a: Tensor | None, b: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the sum (where there is a residual), and the reciprocal norms (M,)."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(M, dtype=torch.float32)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    strides = rows.stride(0), 0 if added is None else added.stride(0)
    factors = map(_float32, (a, b, weight))
    run("rms_norm", x.dtype, rows, added, *factors, y, total, rstd, *strides, M, N, eps)
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
    """Gradients of x, weight, residual, and of a and b in one float32 tensor (2,); empty for missing ones."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    dx, dresidual = torch.empty(x.shape, dtype=x.dtype), x.new_empty(0 if a is None else x.shape)
    dscales = torch.empty(0 if a is None else M, 2, dtype=torch.float32)
    dweights = torch.zeros(0 if weight is None else -(-M // ROWS), N, dtype=torch.float32)
    dy, x = as_rows(dy), as_rows(x)
    dtotal, residual = (None if part is None else as_rows(part) for part in (dtotal, residual))
    strides = (0 if part is None else part.stride(0) for part in (dy, dtotal, x, residual))
    run(
        "rms_norm_backward", x.dtype,
        dy, dtotal, x, rstd, residual, *map(_float32, (a, b, weight)),
        dx, dresidual, dscales, dweights, ROWS, *strides, M, N,
    )  # fmt: skip
    return (
        dx,
        x.new_empty(0) if weight is None else dweights.sum(0).to(weight.dtype),
        dresidual,
        dscales.new_empty(0) if a is None else dscales.sum(0),
    )

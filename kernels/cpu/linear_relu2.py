"""The MLP on CPUs: the operation of ../linear_relu2.py, by torch's matmuls and ReLU^2 in place."""

from __future__ import annotations

from torch import Tensor

from hotlap.kernels.batch_invariant import product
from hotlap.kernels.cpu.library import run


def forward(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """y (M, D) and a (M, N)."""
    a = product(x, w_in)
    run("relu2", a.dtype, a, a.numel())
    return product(a, w_out), a


def backward(dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dp = dy @ w_out
    run("relu2_backward", a.dtype, dp, a, a.numel())
    return dp @ w_in, dp.T @ x, dy.T @ a

"""The MLP on CPUs: the operation of ../linear_relu2.py, by torch's matmuls and ReLU^2 in place."""

from __future__ import annotations

from torch import Tensor

from hotlap.kernels.cpu.library import run


def forward(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """y (M, D) and a (M, N)."""
    a = x @ w_in.T
    run("relu2", a.dtype, a, a.numel())
    return a @ w_out.T, a


def backward(dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dp = dy @ w_out
    run("relu2_backward", a.dtype, dp, a, a.numel())
    return dp @ w_in, dp.T @ x, dy.T @ a

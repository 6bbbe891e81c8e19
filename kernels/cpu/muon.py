"""The elementwise halves of a Muon step on CPUs: operations of ../muon.py, for float32 weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hotlap.kernels.cpu.library import run


def momentum_update(
    momentum: Tensor, grads: list[Tensor], beta: float, dtype: torch.dtype, eps: float
) -> Tensor:
    """Update momentum (G, M, N) in place, and return the Nesterov update in dtype, with rows of norm 1."""
    _, M, N = momentum.shape
    update = torch.empty(momentum.shape, dtype=dtype)
    for of, grad, out in zip(momentum, grads, update, strict=True):
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        run("muon_momentum", dtype, grad, of, out, grad.stride(0), M, N, beta, eps)
    increment_version(momentum)  # so that autograd notices a tensor saved before
    return update


def apply(weights: list[Tensor], update: Tensor, factors: Tensor, lr: float, decay: float) -> None:
    """Move G weights (M, N) in place. factors: (G, M, 1) or (G, 1, N)."""
    _, M, N = update.shape
    of_rows, factors = factors.shape[-1] == 1, factors.contiguous()
    for weight, step, scale in zip(weights, update, factors, strict=True):
        strides = *weight.stride(), *step.stride()
        run("muon_apply", update.dtype, weight, step, scale, *strides, int(of_rows), M, N, lr, decay)
        increment_version(weight)

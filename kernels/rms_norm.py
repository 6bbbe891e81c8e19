"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """The specification, with statistics in float32. x: (..., D), weight: (D,) or None; returns x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """RMSNorm of x (..., D), scaled by weight (D,) where given. Same shape and dtype as x."""
    return rms_norm_ref(x, weight, eps)

"""QK-norm and rotary position embedding of queries and keys (RoFormer, Su et al., 2021).

Each head vector is divided by its root mean square, multiplied by a gain, and its two halves (a, b) are
rotated by the angle of its position: (a cos + b sin, b cos - a sin), nanochat's direction.
"""
# B batch, T time, H heads, C head dim

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.rms_norm import EPS


def rotary_tables(length: int, head_dim: int, base: float, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `length` positions, each (length, C / 2) in float32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequency = base ** (-channel / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def qk_norm_rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, gain: float = 1.0, eps: float = EPS) -> Tensor:
    """The specification, in float32. x: (B, T, H, C); cos, sin: (T, C/2) or (B, T, C/2)."""
    y = x.float()
    y = y * (gain * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))
    a, b = y.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, C/2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def qk_norm_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate queries (B, T, H, C) and keys (B, T, K, C), strided views welcome.

    cos and sin hold the rows of `rotary_tables` for the positions of these T tokens: (T, C/2), or (B, T, C/2)
    where sequences stand at different positions. Returns contiguous tensors in the dtypes of q and k.
    """
    return qk_norm_rotary_ref(q, cos, sin, gain), qk_norm_rotary_ref(k, cos, sin, gain)

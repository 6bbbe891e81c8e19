"""Weights in int8 for decoding, which reads them all for each token: half the bytes of bfloat16.

Symmetric, with one scale for each output: W = diag(scales) Q. `decode_linear.py` multiplies with Q and scales
the sums, so that only W is rounded. A weight is off by up to scale / 2, a 254th of its row's largest.
"""
# N outputs, D inner dimension

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # -128 is left out, for symmetry


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q in int8 (N, D) and scales in float32 (N,) of a weight (N, D). ValueError if it is not finite."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
    if not largest.isfinite().all():
        raise ValueError("a weight is not finite, so it has no scale for int8; its model is damaged")
    scales = largest / LARGEST
    divisor = torch.where(scales > 0, scales, 1)  # rows of zeros, or too small for a scale
    return (weight / divisor[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def dequantized(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (N, D) that Q and scales stand for, rounded to a dtype."""
    return (quantized.float() * scales[:, None]).to(dtype)

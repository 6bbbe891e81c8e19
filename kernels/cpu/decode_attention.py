"""Attention of one new token of each sequence on CPUs: the operation of ../decode_attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    (B, _, H, C), (S, K) = q.shape, k_cache.shape[1:3]
    y = torch.empty(q.shape, dtype=q.dtype)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    slots, lengths = (x.to(torch.int64).contiguous() for x in (slots, lengths))
    run(
        "decode_attention", q.dtype, q, k, v, k_cache, v_cache, slots, lengths, y,
        *(x.stride()[::2] for x in (q, k, v)), *(x.stride()[:3] for x in (k_cache, v_cache)),
        B, H, K, C, S, window, float(softcap), float(scale),
    )  # fmt: skip
    return y

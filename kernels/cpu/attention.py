"""Attention in one order on CPUs: the operation of ../attention_in_order.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
    lengths: Tensor | None,
    document_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    y = torch.empty(q.shape, dtype=q.dtype)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    numbers = (x if x is None else x.to(torch.int64).contiguous() for x in (slots, lengths, document_start))
    run(
        "attention_in_order", q.dtype, q, k, v, *numbers, y, *(x.stride()[:3] for x in (q, k, v)),
        B, T, H, K, C, S, window, float(softcap), float(scale),
    )  # fmt: skip
    return y

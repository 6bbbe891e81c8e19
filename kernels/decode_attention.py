"""Attention of a few new tokens against a key-value cache, where each sequence has its own length."""
# B batch, T new tokens, S cache slots, H heads, K kv heads, C head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, window: int | None = None
) -> Tensor:
    """The specification. Query t of sequence b stands at positions[b, t] and sees the cache up to there."""
    s = torch.arange(k_cache.shape[1], device=q.device)
    distance = positions[:, None, :, None] - s  # (B, 1, T, S)
    mask = (distance >= 0) & (distance < (window or k_cache.shape[1]))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k_cache.shape[2],
    )
    return y.transpose(1, 2)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, window: int | None = None
) -> Tensor:
    """Attention of new queries against the cache, which already holds their own keys and values.

    q: (B, T, H, C); k_cache, v_cache: (B, S, K, C); positions: (B, T) integers. window: keys that a query
    sees, its own included; None is all. Returns (B, T, H, C) in q's dtype.
    """
    return decode_attention_ref(q, k_cache, v_cache, positions, window)

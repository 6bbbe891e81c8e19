"""Causal self-attention with sliding windows, grouped heads and packed documents.

A query at position t sees the keys s with t - window < s <= t, so that a window counts the query's own key,
and with s >= document_start[t], so that documents packed into one row do not see each other.
"""
# B batch, T queries, H heads, K kv heads, C head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_keys(length: int, window: int, document_start: Tensor | None, device) -> Tensor:
    """Boolean (T, T), or (B, 1, T, T) with documents: whether query row may see key column."""
    t = torch.arange(length, device=device)
    distance = t[:, None] - t
    mask = (distance >= 0) & (distance < window)
    if document_start is not None:
        mask = mask & (t >= document_start[:, None, :, None])
    return mask


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """The specification: the whole T x T matrix, softmax in float32."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))  # (B, H, T, C)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = visible_keys(q.shape[2], window or q.shape[2], document_start, q.device)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2)


def attention_blockwise(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, document_start: Tensor | None
) -> Tensor:
    """Plain products over blocks of queries, each with only the keys that its window and causality leave.

    For CPUs, where it is 2 to 6 times as fast as scaled_dot_product_attention in bfloat16 (measured on two
    cores of a Zen 5 EPYC at 64 to 256 tokens): half of the square is never computed, and products run in
    bfloat16.
    """
    _, T, H, C = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, C)
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    window = window or T
    size = max(64, T // 16)  # few enough blocks for a compiler to unroll
    position = torch.arange(T, device=q.device)
    blocks = []
    for start in range(0, T, size):
        end, first = min(start + size, T), max(0, start - window + 1)
        query, key = position[start:end, None], position[None, first:end]
        mask = (key <= query) & (query - key < window)
        if document_start is not None:
            mask = mask & (key >= document_start[:, None, start:end, None])
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() * C**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
        blocks.append(weights @ v[:, :, first:end])
    return torch.cat(blocks, dim=2).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """Causal attention over whole sequences.

    q: (B, T, H, C), k and v: (B, T, K, C) with H a multiple of K. window: keys that a query sees, its own
    included; None is all. document_start: (B, T) integers, the position at which each token's document
    starts; None is one document a row. Returns (B, T, H, C) in q's dtype.
    """
    if not q.is_cuda:
        return attention_blockwise(q, k, v, window, document_start)
    T = q.shape[1]
    plain = document_start is None and (window is None or window >= T)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if plain else visible_keys(T, window or T, document_start, q.device),
        is_causal=plain,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)

"""Attention that gives a query the same bits wherever it is computed, for the batch-invariant mode.

A query's scores, their softmax and its sum of values are computed on its own, over the keys that it sees from
the first to the last. So nothing depends on the other queries: neither on their number, nor on whether they
are of a training row, a prompt or a decoding step. The kernel is in C. Backward is that of
`attention_blockwise`, which recomputes the weights by matmuls.
"""
# B sequences, T queries, S keys or cache positions, H heads, K kv heads, C head dim

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.attention_blockwise import _attention_blockwise_backward
from hotlap.kernels.cpu.attention import forward
from hotlap.kernels.dispatch import kernel_op


def _save(ctx, inputs, output):
    q, k, v, _, _, document_start, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, document_start)


def _gradients(ctx, dy):
    return *_attention_blockwise_backward(dy, *ctx.saved_tensors, *ctx.options), *(None,) * 6


_attention_in_order = kernel_op(
    "attention_in_order",
    forward,
    lambda q, *_: torch.empty(q.shape, dtype=q.dtype),  # contiguous, whatever the order of q in memory
    _save,
    _gradients,
    opaque=True,
)


def attention_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None = None,
    lengths: Tensor | None = None,
    document_start: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of q (B, T, H, C), on a CPU where there are kernels in C. Returns (B, T, H, C).

    k, v: (B, T, K, C), of the queries' own positions; or with slots and lengths (B,) rows (slots, S, K, C) of
    a cache, to which those of the T new tokens have been appended, as in `decode_attention`, and then without
    gradients. document_start (B, T), window, softcap, scale: as in `attention`; 0 is none.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention_in_order(q, k, v, slots, lengths, document_start, window, float(softcap), float(scale))

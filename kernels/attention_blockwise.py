"""Causal attention with plain matmuls over blocks of queries, each with only the keys that it may see.

For CPUs. The upper half of the T x S square is never computed, nor what a window or documents hide, so cost
and memory grow with the tokens times the keys that a query sees. The backward pass recomputes the weights:

    w = softmax(scale q k^T)    dw = dy v^T    ds = w (dw - sum(w dw))
    dv = w^T dy    dq = scale ds k    dk = scale ds^T q

Scores and weights have the dtype of the inputs; matmuls and softmax accumulate in float32. The operation is
opaque to compilers: document starts decide what is computed, which no graph can express, and a graph of every
block takes long to compile.
"""
# B batch, T queries, S keys, H heads, K kv heads, G heads that share keys, C head dim; M, N rows of a block

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hotlap.kernels.dispatch import kernel_op


def block_rows(T: int) -> int:
    """Queries per block, as fastest on two cores of a Zen 5 EPYC. Short rows come in large batches, and often
    hold short documents.
    """
    return 64 if T <= 512 else 128


def masked_softmax(scores: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """Softmax over the last dimension where mask is true; uniform if it is true nowhere."""
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)


def without_blind(y: Tensor, S: int, document_start: Tensor | None) -> Tensor:
    """y (B, T, H, C), with zeros for queries before the first key, or before their document."""
    T = y.shape[1]
    if document_start is None and T <= S:
        return y
    sees = torch.arange(S - T, S, device=y.device)[None] >= (0 if document_start is None else document_start)
    return y.masked_fill(~(sees[:, :, None, None]), 0)


def _blocks(
    q: Tensor, k: Tensor, document_start: Tensor | None, window: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries of q (B, T, H, C), the keys that any of them sees, and a bias for their scores:
    (1 or B K, G M, N), 0 where a query sees a key and very negative elsewhere.
    """
    T, H, S, K = *q.shape[1:3], *k.shape[1:3]
    if document_start is not None:
        document_start = document_start.to(torch.int32)
    for start in range(0, T, block_rows(T)):
        end = min(start + block_rows(T), T)
        first = max(0, S - T + start - window + 1) if window else 0
        if document_start is not None and q.device.type == "cpu":  # where reading a number is cheap
            first = max(first, int(document_start[:, start:end].min()))
        key = torch.arange(first, max(first, S - T + end), dtype=torch.int32, device=q.device)
        distance = torch.arange(S - T + start, S - T + end, device=q.device)[:, None] - key
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        hidden = hidden.view(1, 1, 1, *distance.shape)
        if document_start is not None:
            hidden = hidden | (key < document_start[:, None, None, start:end, None])
        # half of the least number, for a score added to the least would be -inf
        bias = hidden.to(q.dtype).mul_(torch.finfo(q.dtype).min / 2)
        bias = bias.expand(-1, K if len(bias) > 1 else 1, H // K, -1, -1)
        yield slice(start, end), slice(first, first + len(key)), bias.flatten(2, 3).flatten(0, 1)


def _heads_first(x: Tensor, K: int) -> Tensor:
    """(B, T, H, C) as contiguous (B K, G, T, C)."""
    B, T, H, C = x.shape
    return x.transpose(1, 2).reshape(B * K, H // K, T, C).contiguous()


def _weights(
    q: Tensor, k: Tensor, bias: Tensor, softcap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The softmax (B K, G M, N) over a block of keys, and the slope of the softcap, if there is one."""
    if not softcap:
        return torch.baddbmm(bias, q, k.mT, alpha=scale).softmax(-1), None
    wide = torch.promote_types(q.dtype, torch.float32)
    t = (q @ k.mT).to(wide).mul_(scale / softcap).tanh_()
    return torch.add(bias, t, alpha=softcap).softmax(-1).to(q.dtype), 1 - t * t


def _forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int, softcap: float, scale: float
) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    S, K = k.shape[1:3]
    blocks = _blocks(q, k, document_start, window)
    y = _empty(q)
    out = y.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, C)
    q, k, v = _heads_first(q, K), _heads_first(k, K)[:, 0], _heads_first(v, K)[:, 0]
    for m, n, bias in blocks:
        weights, _ = _weights(q[:, :, m].flatten(1, 2), k[:, n], bias, softcap, scale)
        part = out[:, :, :, m]
        part.copy_((weights @ v[:, n]).view(part.shape))
    return without_blind(y, S, document_start)


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    S, K = k.shape[1:3]
    blocks = _blocks(q, k, document_start, window)
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    out = dq.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, C)
    dy, q = _heads_first(without_blind(dy, S, document_start), K), _heads_first(q, K)
    k, v = _heads_first(k, K)[:, 0], _heads_first(v, K)[:, 0]
    wide = torch.promote_types(q.dtype, torch.float32)
    k_sum, v_sum = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for m, n, bias in blocks:
        query, gradient = q[:, :, m].flatten(1, 2), dy[:, :, m].flatten(1, 2)  # (B K, G M, C)
        weights, slope = _weights(query, k[:, n], bias, softcap, scale)
        v_sum[:, n] += weights.mT @ gradient
        ds = torch._softmax_backward_data(gradient @ v[:, n].mT, weights, -1, weights.dtype)
        ds = ds if slope is None else ds * slope.to(ds.dtype)
        part = out[:, :, :, m]
        torch.mul((ds @ k[:, n]).view(part.shape), scale, out=part)
        k_sum[:, n] += ds.mT @ query
    dk.copy_(k_sum.mul_(scale).view(-1, K, *k.shape[1:]).transpose(1, 2))
    dv.copy_(v_sum.view(-1, K, *v.shape[1:]).transpose(1, 2))
    return dq, dk, dv


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx, inputs, output):
    q, k, v, document_start, ctx.window, ctx.softcap, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, document_start)


def _gradients(ctx, dy):
    gradients = _attention_blockwise_backward(dy, *ctx.saved_tensors, ctx.window, ctx.softcap, ctx.scale)
    return *gradients, None, None, None, None


_attention_blockwise_backward = kernel_op(
    "attention_blockwise_backward",
    _backward,
    lambda dy, q, k, v, *_: (_empty(q), _empty(k), _empty(v)),
    opaque=True,
)
attention_blockwise = kernel_op(
    "attention_blockwise", _forward, lambda q, *_: _empty(q), _save, _gradients, opaque=True
)

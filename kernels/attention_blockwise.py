"""Causal attention with plain matmuls over blocks of queries, each with only the keys that it may see.

For CPUs. The upper half of the T x S square is never computed, nor what a window or documents hide, so cost
and memory grow with the tokens times the keys that a query sees. The backward pass recomputes the weights:

    w = softmax(scale q k^T)    dw = dy v^T    ds = w (dw - sum(w dw))
    dv = w^T dy    dq = scale ds k    dk = scale ds^T q

Scores and weights have the dtype of the inputs; matmuls and softmax accumulate in float32. The softmax and
its gradient are kernels in C, or without them torch's, with a bias that hides keys. The operation is opaque
to compilers: document starts decide what is computed, which no graph can express, and a graph of every block
takes long to compile.
"""
# B batch, T queries, S keys, H heads, K kv heads, G heads that share keys, C head dim; M, N rows of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run
from hotlap.kernels.cpu.qkv import empty_heads
from hotlap.kernels.dispatch import kernel_op, use_c

# Queries of a block. Of 32, 64, 128 and 256, this took at most a tenth longer than the best for rows of 256
# to 2048 tokens, with and without documents, but for bfloat16 rows of 256 (a fifth). Each of the others was
# slower by more somewhere (one thread of a Xeon with AMX, float32 and bfloat16).
ROWS = 128


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


class Masks(NamedTuple):
    """What decides which keys a query of q (B, T, H, C) sees."""

    T: int
    S: int
    G: int
    window: int  # 0 for none
    document_start: Tensor | None  # (B, T), int32

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, and the keys that any of them sees."""
        T, S, _, window, document_start = self
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            first = max(0, S - T + start - window + 1) if window else 0
            if document_start is not None and document_start.device.type == "cpu":  # where reading is cheap
                first = max(first, int(document_start[:, start:end].min()))
            yield slice(start, end), slice(first, max(first, S - T + end))

    def softmax(self, scores: Tensor, m: slice, n: slice, scale: float) -> Tensor:
        """The weights of scale times the scores (B K, G M, N) of a block, which are overwritten."""
        T, S, G, window, starts = self
        M, N = m.stop - m.start, n.stop - n.start
        if not use_c(scores):
            return scores.mul_(scale).add_(self.bias(scores, m, n)).softmax(-1)
        B, at, stride = 1, None, 0
        if starts is not None:
            B, at, stride = len(starts), starts[:, m], starts.stride(0)
        sizes = B, len(scores) // B, G, M, N
        run(
            "masked_softmax",
            scores.dtype,
            scores,
            at,
            stride,
            *sizes,
            S - T + m.start,
            n.start,
            window,
            scale,
        )
        return scores

    def bias(self, scores: Tensor, m: slice, n: slice) -> Tensor:
        """(1 or B K, G M, N): 0 where a query sees a key, and very negative elsewhere."""
        T, S, G, window, starts = self
        key = torch.arange(n.start, n.stop, dtype=torch.int32, device=scores.device)
        distance = torch.arange(S - T + m.start, S - T + m.stop, device=scores.device)[:, None] - key
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        hidden = hidden.view(1, 1, 1, *distance.shape)
        if starts is not None:
            hidden = hidden | (key < starts[:, None, None, m, None])
        # half of the least number, for a score added to the least would be -inf
        bias = hidden.to(scores.dtype).mul_(torch.finfo(scores.dtype).min / 2)
        bias = bias.expand(-1, len(scores) // len(bias) if starts is not None else 1, G, -1, -1)
        return bias.flatten(2, 3).flatten(0, 1)


def _softmax_backward(dweights: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, from that of the weights (..., N), which is overwritten."""
    if not use_c(weights):
        return torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale)
    N = weights.shape[-1]
    run("softmax_backward", weights.dtype, dweights, weights, weights.numel() // max(N, 1), N, scale)
    return dweights


def _heads_first(x: Tensor, K: int) -> Tensor:
    """(B, T, H, C) as contiguous (B K, G, T, C)."""
    B, T, H, C = x.shape
    return x.transpose(1, 2).reshape(B * K, H // K, T, C).contiguous()


def _weights(
    q: Tensor, k: Tensor, masks: Masks, block: tuple[slice, slice], softcap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The softmax (B K, G M, N) over a block of keys, and the slope of the softcap, if there is one."""
    scores = q @ k.mT
    if not softcap:
        return masks.softmax(scores, *block, scale), None
    wide = torch.promote_types(q.dtype, torch.float32)
    t = scores.to(wide).mul_(scale / softcap).tanh_()
    return masks.softmax(t.clone(), *block, softcap).to(q.dtype), 1 - t * t


def _parts(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Masks]:
    """q (B K, G, T, C), k and v (B K, S, C), and the masks."""
    T, H, S, K = *q.shape[1:3], *k.shape[1:3]
    starts = None if document_start is None else document_start.to(torch.int32).contiguous()
    masks = Masks(T, S, H // K, window, starts)
    return _heads_first(q, K), _heads_first(k, K)[:, 0], _heads_first(v, K)[:, 0], masks


def _forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int, softcap: float, scale: float
) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    S, K = k.shape[1:3]
    y = _empty(q)
    out = y.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, C)
    q, k, v, masks = _parts(q, k, v, document_start, window)
    for m, n in masks.blocks():
        weights, _ = _weights(q[:, :, m].flatten(1, 2), k[:, n], masks, (m, n), softcap, scale)
        part = out[:, :, :, m]
        part.copy_((weights @ v[:, n]).view(part.shape))
    return y if use_c(y) else without_blind(y, S, document_start)  # in C, their weights are 0


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
    dq, dk, dv = (empty_heads(*x.shape, x) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(x.zero_() for x in (dq, dk, dv))
    S, K = k.shape[1:3]
    dy = _heads_first(dy if use_c(dy) else without_blind(dy, S, document_start), K)
    q, k, v, masks = _parts(q, k, v, document_start, window)
    of_q = dq.transpose(1, 2).view(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    k_sum, v_sum = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for m, n in masks.blocks():
        query, gradient = q[:, :, m].flatten(1, 2), dy[:, :, m].flatten(1, 2)  # (B K, G M, C)
        weights, slope = _weights(query, k[:, n], masks, (m, n), softcap, scale)
        v_sum[:, n] += weights.mT @ gradient
        ds = _softmax_backward(gradient @ v[:, n].mT, weights, scale)
        ds = ds if slope is None else ds * slope.to(ds.dtype)
        part = of_q[:, :, m]
        part.copy_((ds @ k[:, n]).view(part.shape))
        k_sum[:, n] += ds.mT @ query
    dk.transpose(1, 2).view(k.shape).copy_(k_sum)
    dv.transpose(1, 2).view(v.shape).copy_(v_sum)
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
    lambda dy, *parts: tuple(empty_heads(*x.shape, x) for x in parts[:3]),
    opaque=True,
)
attention_blockwise = kernel_op(
    "attention_blockwise", _forward, lambda q, *_: _empty(q), _save, _gradients, opaque=True
)

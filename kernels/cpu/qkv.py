"""Attention's inputs on CPUs: the operation of ../qkv.py, for float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.cpu.library import run


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(cos: Tensor, sin: Tensor, B: int) -> tuple[Tensor, Tensor, int]:
    """The tables, in float32, and their stride over the batch."""
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 and B > 1 and len(cos) > 1 else 0


def empty_heads(B: int, T: int, heads: int, C: int, like: Tensor) -> Tensor:
    """(B, T, heads, C), where a head's rows lie together in memory, as matmuls over heads need them."""
    return torch.empty((B, heads, T, C), dtype=like.dtype, device=like.device).transpose(1, 2)


def forward(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    gain: float,
    eps: float,
    gate: Tensor | None,
    value_embedding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and the reciprocal norms of q and k, (B, T, H + K)."""
    (B, T, N, C), K = qkv.shape, kv_heads
    H = N - 2 * K
    q, k, v = (empty_heads(B, T, heads, C, qkv) for heads in (H, K, K))
    rstd = torch.empty((B, T, H + K), dtype=torch.float32)
    qkv = _unit(qkv)
    if gate is not None:
        gate, value_embedding = gate.contiguous(), value_embedding.contiguous()
    cos, sin, cos_b = _tables(cos, sin, B)
    run(
        "attention_inputs", qkv.dtype, qkv, cos, sin, gate, value_embedding, q, k, v, rstd,
        *(x.stride()[:3] for x in (qkv, q, k, v)), cos_b, B, T, H, K, C, gain, eps,
    )  # fmt: skip
    return q, k, v, rstd


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor,
    gain: float,
    gate: Tensor | None,
    value_embedding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, gate and value embedding; empty for those that are missing."""
    (B, T, H, C), K = q.shape, k.shape[2]
    dqkv = torch.empty((B, T, H + 2 * K, C), dtype=q.dtype)
    dgate, dvalue_embedding = (
        q.new_empty(0 if x is None else x.shape) for x in (gate, value_embedding)
    )  # fmt: skip
    dq, dk, dv = _unit(dq), _unit(dk), _unit(dv)
    if gate is not None:
        gate, value_embedding = gate.contiguous(), value_embedding.contiguous()
    cos, sin, cos_b = _tables(cos, sin, B)
    run(
        "attention_inputs_backward", q.dtype, dq, dk, dv, q, k, cos, sin, gate, value_embedding, rstd,
        dqkv, dgate, dvalue_embedding, *(x.stride()[:3] for x in (dq, dk, dv, q, k)),
        cos_b, B, T, H, K, C, gain,
    )  # fmt: skip
    return dqkv, dgate, dvalue_embedding

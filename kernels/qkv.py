"""From the qkv projection to what attention takes, in one pass: QK-norm and rotary embedding (RoFormer, Su et
al., 2021) of queries and keys, and value embeddings.

Each query or key x is divided by its root mean square and multiplied by a gain, and its two halves (a, b) are
rotated by the angle of its position: (a cos + b sin, b cos - a sin), nanochat's direction. Values of a layer
with value embeddings e become v + 3 sigmoid(gate) e, with one gate for each token and head.

Computed in float32 and rounded once. The projection is read in place. Bound by memory, for elements of e
bytes: 2 B T (H + 2K) C e forward and B T (3H + 5K) C e backward; for a value embedding B T K C e more forward
and 2 B T K C e backward. About 8 FLOPs an element of queries and keys forward and 11 backward. The kernels
are in qkv_kernels.py.
"""
# B batch, T time, H query heads, K kv heads, N = H + 2K heads of the projection, C head dim

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.cpu import qkv as cpu
from hotlap.kernels.dispatch import device_facts, kernel_op, promote, use_c, use_triton, wrap_triton
from hotlap.kernels.qkv_kernels import _qkv_backward_kernel, _qkv_forward_kernel, _qkv_tiles
from hotlap.kernels.rms_norm import EPS
from hotlap.kernels.tiles import Case, Tile, cdiv, next_power_of_2, pick_tile, type_name


def rotary_tables(length: int, head_dim: int, base: float, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `length` positions, each (length, C / 2) in float32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequency = base ** (-channel / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def _norm_rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, gain: float) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * (gain * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS))
    a, b = y.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, C/2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def attention_inputs_ref(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    gain: float = 1.0,
    gate: Tensor | None = None,
    value_embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; queries and keys in float32 or wider, values in the dtype. v may be a view."""
    q, k, v = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    if gate is not None:
        v = v + (3 * torch.sigmoid(gate)).unsqueeze(-1) * value_embedding
    return _norm_rotary_ref(q, cos, sin, gain), _norm_rotary_ref(k, cos, sin, gain), v


def _tile(B: int, T: int, H: int, K: int, half: int, device: torch.device) -> tuple[Tile, tuple[int]]:
    """The tile for heads of two halves, and the grid."""
    tile = pick_tile(_qkv_tiles, next_power_of_2(half), device_facts(device))
    of_q, of_kv = (cdiv(B * T * heads, tile.blocks["ROWS"]) for heads in (H, K))
    return tile, (of_q + 2 * of_kv,)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """The tables, and their strides over batch and time."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2)


def _forward(
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
    q, k, v, rstd = _fake(qkv, kv_heads)
    if qkv.numel() == 0:
        return q, k, v, rstd
    (B, T, H, C), K = q.shape, kv_heads
    qkv = _unit(qkv)
    if gate is not None:
        gate, value_embedding = gate.contiguous(), value_embedding.contiguous()
    cos, sin, cos_b, cos_t = _angles(cos, sin)
    tile, grid = _tile(B, T, H, K, C // 2, qkv.device)
    with torch.cuda.device_of(qkv):
        wrap_triton(_qkv_forward_kernel)[grid](
            qkv, cos, sin, gate, value_embedding, q, k, v, rstd, gain, eps,
            *qkv.stride()[:3], cos_b, cos_t, B, T, H, K, HALF=C // 2, **tile.arguments,
        )  # fmt: skip
    return q, k, v, rstd


def _backward(
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
    dqkv, dgate, de = _fake_gradients(q, k, gate, value_embedding)
    if dqkv.numel() == 0:
        return dqkv, dgate, de
    (B, T, H, C), K = q.shape, k.shape[2]
    dq, dk, dv = _unit(dq), _unit(dk), _unit(dv)
    if gate is not None:
        gate, value_embedding = gate.contiguous(), value_embedding.contiguous()
    cos, sin, cos_b, cos_t = _angles(cos, sin)
    tile, grid = _tile(B, T, H, K, C // 2, q.device)
    with torch.cuda.device_of(q):
        wrap_triton(_qkv_backward_kernel)[grid](
            dq, dk, dv, q, k, cos, sin, gate, value_embedding, rstd,
            dqkv, *((None, None) if gate is None else (dgate, de)), gain,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], cos_b, cos_t, B, T, H, K,
            HALF=C // 2, **tile.arguments,
        )  # fmt: skip
    return dqkv, dgate, de


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(qkv, kv_heads, *_):
    B, T, N, C = qkv.shape
    K, H = kv_heads, N - 2 * kv_heads
    if use_c(qkv):
        q, k, v = (cpu.empty_heads(B, T, n, C, qkv) for n in (H, K, K))
    else:
        q, k, v = (torch.empty((B, T, n, C), dtype=qkv.dtype, device=qkv.device) for n in (H, K, K))
    return q, k, v, torch.empty((B, T, H + K), dtype=torch.float32, device=qkv.device)


def _fake_gradients(q, k, gate, value_embedding):
    B, T, H, C = q.shape
    dqkv = torch.empty((B, T, H + 2 * k.shape[2], C), dtype=q.dtype, device=q.device)
    if gate is None:
        return dqkv, q.new_empty(0), q.new_empty(0)
    return dqkv, _empty(gate), _empty(value_embedding)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.gain, _, gate, value_embedding = inputs
    q, k, _, rstd = output
    ctx.save_for_backward(q, k, cos, sin, rstd, gate, value_embedding)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dq, dk, dv, _):
    q, k, cos, sin, rstd, gate, value_embedding = ctx.saved_tensors
    dq = torch.zeros_like(q) if dq is None else dq
    dk = torch.zeros_like(k) if dk is None else dk
    dv = torch.zeros_like(k) if dv is None else dv
    dqkv, dgate, de = _qkv_backward(dq, dk, dv, q, k, cos, sin, rstd, ctx.gain, gate, value_embedding)
    if gate is None:
        dgate = de = None
    return dqkv, None, None, None, None, None, dgate, de


_qkv_backward = kernel_op(
    "attention_inputs_backward",
    _backward,
    lambda dq, dk, dv, q, k, cos, sin, rstd, gain, gate, e: _fake_gradients(q, k, gate, e),
    c=cpu.backward,
)
_qkv = kernel_op("attention_inputs", _forward, _fake, _save, _gradients, c=cpu.forward)


def attention_inputs(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    gain: float = 1.0,
    gate: Tensor | None = None,
    value_embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, H, C), normalised and rotated, keys (B, T, K, C), as they, and values (B, T, K, C).

    qkv: (B, T, H + 2K, C), the heads of the queries, the K = kv_heads of the keys, and those of the values.
    cos and sin hold the rows of `rotary_tables` for the positions of these T tokens: (T, C/2), or (B, T, C/2)
    if sequences have different positions. They take no gradient. gain: > 0. gate, value_embedding: (B, T, K)
    and (B, T, K, C), both or neither; 3 sigmoid(gate) value_embedding is added to the values. All but the
    tables are of one dtype; under `torch.autocast` they may differ, and the widest counts. Returns tensors of
    that dtype, contiguous, or from the kernels in C contiguous as (B, heads, T, C).

    Without a value embedding the values are copied, 2 B T K C elements moved, because an operation of torch
    may not return a view of its input.
    """
    qkv, gate, value_embedding = promote(qkv, gate, value_embedding)
    _check(qkv, kv_heads, cos, sin, gain, gate, value_embedding)
    if use_triton(qkv) or use_c(qkv):
        return _qkv(qkv, kv_heads, cos, sin, gain, EPS, gate, value_embedding)[:3]
    parts = attention_inputs_ref(qkv, kv_heads, cos, sin, gain, gate, value_embedding)
    return tuple(x.contiguous() for x in parts)  # heads as they lie in qkv, or a view of it


def _check(qkv, kv_heads, cos, sin, gain, gate, value_embedding) -> None:
    B, T, N, C = qkv.shape
    if not 0 < 2 * kv_heads < N or C % 2:
        raise ValueError(f"qkv is {tuple(qkv.shape)}; needed is (B, T, H + 2 x {kv_heads}, C), with C even")
    if not gain > 0:
        raise ValueError(f"gain={gain} has to be positive")
    if cos.shape != sin.shape or cos.shape not in ((T, C // 2), (1, T, C // 2), (B, T, C // 2)):
        shapes = f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{shapes}; qkv needs ({T}, {C // 2}) or ({B}, {T}, {C // 2})")
    for name, x, shape in (
        ("gate", gate, (B, T, kv_heads)),
        ("value_embedding", value_embedding, (B, T, kv_heads, C)),
    ):
        if (x is None) != (gate is None):
            raise ValueError("gate and value_embedding have to be given both, or neither")
        if x is not None and (x.shape != shape or x.dtype != qkv.dtype):
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; it has to be {shape} {qkv.dtype}")


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: heads of 64 and 128, without and with value embeddings."""
    t = f"*{type_name(dtype)}"
    sizes = dict.fromkeys(("cos_b", "cos_t", "B", "T", "H", "K"), "i32")
    statistics = dict.fromkeys(("cos", "sin", "rstd"), "*fp32")

    def strides(*names: str) -> dict[str, str]:
        return {f"{x}_{dimension}": "i32" for x in names for dimension in "bth"}

    def of(C: int, embedded: bool) -> list[Case]:
        extra = dict.fromkeys(("gate", "e", "dgate", "de"), t if embedded else None)
        forward = dict.fromkeys(("qkv", "q", "k", "v"), t) | statistics | sizes | strides("qkv") | extra
        forward |= {"gain": "fp64", "eps": "fp64", "HALF": C // 2}
        backward = dict.fromkeys(("dq", "dk", "dv", "q", "k", "dqkv"), t) | statistics | sizes | extra
        backward |= strides("dq", "dk", "dv") | {"gain": "fp64", "HALF": C // 2}

        def inputs(device):
            B, T, H, K = 8, 2048, 16, 4
            qkv = torch.randn(B, T, H + 2 * K, C, device=device, dtype=dtype)
            gate, e = qkv[:, :, :K, 0].contiguous(), qkv[:, :, :K].contiguous()
            return qkv, K, *rotary_tables(T, C, 1e5, device), *((gate, e) if embedded else (None, None))

        def run_forward(device):
            qkv, K, cos, sin, *added = inputs(device)
            return lambda: _forward(qkv, K, cos, sin, 1.0, EPS, *added)

        def run_backward(device):
            qkv, K, cos, sin, *added = inputs(device)
            q, k, v, rstd = _forward(qkv, K, cos, sin, 1.0, EPS, *added)
            return lambda: _backward(q, k, v, q, k, cos, sin, rstd, 1.0, *added)

        variant = "value embedding" if embedded else ""
        return [
            Case("_qkv_forward_kernel", forward, _qkv_tiles, C // 2, run_forward, variant),
            Case("_qkv_backward_kernel", backward, _qkv_tiles, C // 2, run_backward, variant),
        ]

    return [case for C in (64, 128) for embedded in (False, True) for case in of(C, embedded)]

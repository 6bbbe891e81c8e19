"""QK-norm and rotary position embedding of queries and keys (RoFormer, Su et al., 2021), in one pass.

Each head vector x is divided by its root mean square and multiplied by a gain, and its two halves (a, b) are
rotated by the angle of its position: (a cos + b sin, b cos - a sin), nanochat's direction. Backward, dy is
rotated back into g and, with r the saved reciprocal norm and n = x r, dx = r gain (g - n mean(g n)).

Computed in float32 and rounded once. q and k are read in place from the fused qkv projection. Bound by
memory: 2 B T (H + K) C e bytes forward and 3 B T (H + K) C e backward, for elements of e bytes; about 8 FLOPs
an element forward and 14 backward.
"""
# B batch, T time, H heads (of q, or of k where they are fewer: K), C head dim

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, triton, use_triton, wrap_triton
from hotlap.kernels.rms_norm import EPS
from hotlap.kernels.tiles import Case, Tile, next_power_of_2, pick_tile, type_name


def rotary_tables(length: int, head_dim: int, base: float, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first `length` positions, each (length, C / 2) in float32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequency = base ** (-channel / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def qk_norm_rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, gain: float = 1.0, eps: float = EPS) -> Tensor:
    """The specification, in float32 or wider. x: (B, T, H, C); cos, sin: (T, C/2) or (B, T, C/2)."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * (gain * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))
    a, b = y.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, C/2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


@jit
def _locate(first, stride_b, stride_t, stride_h, B, T, H, ROWS: tl.constexpr):
    """Rows (batch, token, head) starting at `first`: index, offset, batch, token, and whether they exist."""
    row = first + tl.arange(0, ROWS)[:, None]  # fewer than 2^31, unlike offsets
    token = row // H
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    return row, b * stride_b + t * stride_t + (row % H).to(tl.int64) * stride_h, b, t, row < B * T * H


@jit
def _forward_rows(
    x, cos, sin, y, rstd, gain, eps, first, stride_b, stride_t, stride_h, stride_cos_b, stride_cos_t, B, T, H,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offset, batch, token, real = _locate(first, stride_b, stride_t, stride_h, B, T, H, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = real & (c < HALF)
    a = tl.load(x + offset + c, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK), as all that follow
    b = tl.load(x + offset + HALF + c, mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / (2 * HALF) + eps)
    tl.store(rstd + row, r, real)
    a, b = a * (r * gain), b * (r * gain)
    angle = batch * stride_cos_b + token * stride_cos_t + c
    cosine = tl.load(cos + angle, mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask, other=0.0).to(tl.float32)
    out = y + row.to(tl.int64) * (2 * HALF) + c
    tl.store(out, (a * cosine + b * sine).to(y.dtype.element_ty), mask)
    tl.store(out + HALF, (b * cosine - a * sine).to(y.dtype.element_ty), mask)


@jit
def _rotary_forward_kernel(
    q, k, cos, sin, yq, yk, rstd_q, rstd_k, gain, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, B, T, H, K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gain, eps = tl.cast(gain, tl.float32), tl.cast(eps, tl.float32)
    program, of_q = tl.program_id(0), tl.cdiv(B * T * H, ROWS)
    if program < of_q:
        _forward_rows(
            q, cos, sin, yq, rstd_q, gain, eps, program * ROWS, q_b, q_t, q_h, cos_b, cos_t, B, T, H,
            HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _forward_rows(
            k, cos, sin, yk, rstd_k, gain, eps, (program - of_q) * ROWS, k_b, k_t, k_h, cos_b, cos_t, B, T, K,
            HALF, ROWS, BLOCK,
        )  # fmt: skip


@jit
def _backward_rows(
    dy, x, cos, sin, rstd, dx, gain, first,
    dy_b, dy_t, dy_h, stride_b, stride_t, stride_h, cos_b, cos_t, B, T, H,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offset, batch, token, real = _locate(first, stride_b, stride_t, stride_h, B, T, H, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = real & (c < HALF)
    angle = batch * cos_b + token * cos_t + c
    cosine = tl.load(cos + angle, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK), as all that follow
    sine = tl.load(sin + angle, mask, other=0.0).to(tl.float32)
    _, offset_dy, _, _, _ = _locate(first, dy_b, dy_t, dy_h, B, T, H, ROWS)
    da = tl.load(dy + offset_dy + c, mask, other=0.0).to(tl.float32)
    db = tl.load(dy + offset_dy + HALF + c, mask, other=0.0).to(tl.float32)
    da, db = da * cosine - db * sine, da * sine + db * cosine  # rotated back
    r = tl.load(rstd + row, real, other=0.0)
    a = tl.load(x + offset + c, mask, other=0.0).to(tl.float32) * r
    b = tl.load(x + offset + HALF + c, mask, other=0.0).to(tl.float32) * r
    mean = tl.sum(a * da + b * db, 1, keep_dims=True) / (2 * HALF)
    r *= gain
    out = dx + row.to(tl.int64) * (2 * HALF) + c
    tl.store(out, (r * (da - a * mean)).to(dx.dtype.element_ty), mask)
    tl.store(out + HALF, (r * (db - b * mean)).to(dx.dtype.element_ty), mask)


@jit
def _rotary_backward_kernel(
    dyq, dyk, q, k, cos, sin, rstd_q, rstd_k, dq, dk, gain,
    dyq_b, dyq_t, dyq_h, dyk_b, dyk_t, dyk_h, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, B, T, H, K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gain = tl.cast(gain, tl.float32)
    program, of_q = tl.program_id(0), tl.cdiv(B * T * H, ROWS)
    if program < of_q:
        _backward_rows(
            dyq, q, cos, sin, rstd_q, dq, gain, program * ROWS,
            dyq_b, dyq_t, dyq_h, q_b, q_t, q_h, cos_b, cos_t, B, T, H, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _backward_rows(
            dyk, k, cos, sin, rstd_k, dk, gain, (program - of_q) * ROWS,
            dyk_b, dyk_t, dyk_h, k_b, k_t, k_h, cos_b, cos_t, B, T, K, HALF, ROWS, BLOCK,
        )  # fmt: skip


def _rotary_tiles(block: int, _: Device) -> list[Tile]:
    """As many rows as have about this many elements in each half, and this many per thread."""
    tiles = []
    for elements, warps in ((2048, 4), (1024, 2), (4096, 8), (2048, 2)):
        tiles.append(Tile({"ROWS": max(1, elements // block), "BLOCK": block}, warps))
    return tiles


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: Tensor, sin: Tensor, B: int) -> tuple[Tensor, Tensor, int, int]:
    """The tables, and their strides over batch and time."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2)


def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k, and the reciprocal norms of each, (B, T, H) and (B, T, K)."""
    B, T, H, C = q.shape
    K, half = k.shape[2], q.shape[3] // 2
    yq, yk, rstd_q, rstd_k = _fake(q, k, cos, sin, gain, eps)
    if B * T * (H + K) * C == 0:
        return yq, yk, rstd_q, rstd_k
    q, k = _unit(q), _unit(k)
    cos, sin, cos_b, cos_t = _angles(cos, sin, B)
    tile = pick_tile(_rotary_tiles, next_power_of_2(half), device_facts(q.device))
    rows = tile.blocks["ROWS"]
    grid = (triton.cdiv(B * T * H, rows) + triton.cdiv(B * T * K, rows),)
    with torch.cuda.device_of(q):
        wrap_triton(_rotary_forward_kernel)[grid](
            q, k, cos, sin, yq, yk, rstd_q, rstd_k, gain, eps,
            *q.stride()[:3], *k.stride()[:3], cos_b, cos_t, B, T, H, K, HALF=half, **tile.arguments,
        )  # fmt: skip
    return yq, yk, rstd_q, rstd_k


def _backward(
    dyq: Tensor,
    dyk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    gain: float,
) -> tuple[Tensor, Tensor]:
    B, T, H, C = q.shape
    K, half = k.shape[2], q.shape[3] // 2
    dq, dk = _empty(q), _empty(k)
    if B * T * (H + K) * C == 0:
        return dq, dk
    dyq, dyk, q, k = _unit(dyq), _unit(dyk), _unit(q), _unit(k)
    cos, sin, cos_b, cos_t = _angles(cos, sin, B)
    tile = pick_tile(_rotary_tiles, next_power_of_2(half), device_facts(q.device))
    rows = tile.blocks["ROWS"]
    grid = (triton.cdiv(B * T * H, rows) + triton.cdiv(B * T * K, rows),)
    with torch.cuda.device_of(q):
        wrap_triton(_rotary_backward_kernel)[grid](
            dyq, dyk, q, k, cos, sin, rstd_q, rstd_k, dq, dk, gain,
            *dyq.stride()[:3], *dyk.stride()[:3], *q.stride()[:3], *k.stride()[:3], cos_b, cos_t, B, T, H, K,
            HALF=half, **tile.arguments,
        )  # fmt: skip
    return dq, dk


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(q, k, cos, sin, gain, eps):
    rstd_q, rstd_k = (torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for x in (q, k))
    return _empty(q), _empty(k), rstd_q, rstd_k


def _save(ctx, inputs, output):
    q, k, cos, sin, ctx.gain, _ = inputs
    ctx.save_for_backward(q, k, cos, sin, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dyq, dyk, *_):
    q, k, *rest = ctx.saved_tensors
    dyq = torch.zeros_like(q) if dyq is None else dyq
    dyk = torch.zeros_like(k) if dyk is None else dyk
    dq, dk = _rotary_backward(dyq, dyk, q, k, *rest, ctx.gain)
    return dq, dk, None, None, None, None


_rotary_backward = kernel_op(
    "qk_norm_rotary_backward", _backward, lambda dyq, dyk, q, k, *_: (_empty(q), _empty(k))
)
_rotary = kernel_op("qk_norm_rotary", _forward, _fake, _save, _gradients)


def qk_norm_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate queries (B, T, H, C) and keys (B, T, K, C), which may be strided views.

    cos and sin hold the rows of `rotary_tables` for the positions of these T tokens: (T, C/2), or (B, T, C/2)
    if sequences have different positions. They take no gradient. Returns contiguous tensors in the
    dtypes of q and k.
    """
    B, T, _, C = q.shape
    if k.shape[:2] != (B, T) or k.shape[3] != C or C % 2:
        shapes = f"q is {tuple(q.shape)} and k is {tuple(k.shape)}"
        raise ValueError(f"{shapes}; both have to be (B, T, heads, C) with C even")
    if cos.shape != sin.shape or cos.shape not in ((T, C // 2), (1, T, C // 2), (B, T, C // 2)):
        shapes = f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{shapes}; q needs ({T}, {C // 2}) or ({B}, {T}, {C // 2})")
    if use_triton(q):
        return _rotary(q, k, cos, sin, gain, EPS)[:2]
    return qk_norm_rotary_ref(q, cos, sin, gain), qk_norm_rotary_ref(k, cos, sin, gain)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: heads of 64 and 128."""
    t = f"*{type_name(dtype)}"
    strides = [f"{x}_{dimension}" for x in ("q", "k") for dimension in "bth"]
    sizes = dict.fromkeys([*strides, "cos_b", "cos_t", "B", "T", "H", "K"], "i32")
    statistics = dict.fromkeys(("cos", "sin", "rstd_q", "rstd_k"), "*fp32")
    forward = dict.fromkeys(("q", "k", "yq", "yk"), t) | statistics | sizes | {"gain": "fp64", "eps": "fp64"}
    backward = dict.fromkeys(("dyq", "dyk", "q", "k", "dq", "dk"), t) | statistics | sizes | {"gain": "fp64"}
    backward |= dict.fromkeys([f"dy{stride}" for stride in strides], "i32")

    def of(C: int) -> list[Case]:
        def inputs(device):
            qkv = torch.randn(8, 2048, 24, C, device=device, dtype=dtype)
            return qkv[:, :, :16], qkv[:, :, 16:20], *rotary_tables(2048, C, 1e5, device)

        def run_forward(device):
            arguments = inputs(device)
            return lambda: _forward(*arguments, 1.0, EPS)

        def run_backward(device):
            q, k, cos, sin = inputs(device)
            yq, yk, *rstd = _forward(q, k, cos, sin, 1.0, EPS)
            return lambda: _backward(yq, yk, q, k, cos, sin, *rstd, 1.0)

        half = {"HALF": C // 2}
        return [
            Case("_rotary_forward_kernel", forward | half, _rotary_tiles, C // 2, run_forward),
            Case("_rotary_backward_kernel", backward | half, _rotary_tiles, C // 2, run_backward),
        ]

    return [*of(64), *of(128)]

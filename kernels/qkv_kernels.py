"""The kernels of qkv.py. Programs for queries come first, then those for keys and for values.

Backward needs y, the query or key as attention takes it and keeps it anyway, but not the projection. With r
the saved reciprocal norm and R the rotation, y = gain r R x, and so

    dx = gain r R^T (dy - y mean(y dy) / gain^2)

where the rounding of y adds an error of the size of that of dy, which attention has rounded. With
s = sigmoid(gate): dv = dy, de = 3 s dy, and dgate = 3 s (1 - s) sum(e dy). The gradient of the whole
projection is one tensor, so that nothing has to join it from parts.
"""
# B batch, T time, H query heads, K kv heads, N = H + 2K heads of the projection, C head dim, HALF = C / 2

from __future__ import annotations

from hotlap.kernels.dispatch import Device, jit, tl
from hotlap.kernels.tiles import Tile


@jit
def _place(first, B, T, H, ROWS: tl.constexpr):
    """Rows (batch, time, head) from `first`: the three indices, and whether the rows exist."""
    row = first + tl.arange(0, ROWS)[:, None]  # fewer than 2^31, unlike offsets
    token = row // H
    return (token // T).to(tl.int64), (token % T).to(tl.int64), (row % H).to(tl.int64), row < B * T * H


@jit
def _rotate_rows(
    qkv, cos, sin, y, rstd, gain, eps, first, above, qkv_b, qkv_t, qkv_h, cos_b, cos_t, B, T, H, H_and_K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries or keys: H heads of the projection, which has `above` heads before them."""
    b, t, h, real = _place(first, B, T, H, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = real & (c < HALF)
    x = qkv + b * qkv_b + t * qkv_t + (above + h) * qkv_h + c
    xa = tl.load(x, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK), as all that follow
    xb = tl.load(x + HALF, mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(xa * xa + xb * xb, 1, keep_dims=True) / (2 * HALF) + eps)
    tl.store(rstd + (b * T + t) * H_and_K + above + h, r, real)
    xa, xb = xa * (r * gain), xb * (r * gain)
    angle = b * cos_b + t * cos_t + c
    cosine = tl.load(cos + angle, mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask, other=0.0).to(tl.float32)
    out = y + ((b * T + t) * H + h) * (2 * HALF) + c
    tl.store(out, (xa * cosine + xb * sine).to(y.dtype.element_ty), mask)
    tl.store(out + HALF, (xb * cosine - xa * sine).to(y.dtype.element_ty), mask)


@jit
def _value_rows(
    qkv, gate, e, v, first, above, qkv_b, qkv_t, qkv_h, B, T, K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, t, h, real = _place(first, B, T, K, ROWS)
    c = tl.arange(0, 2 * BLOCK)[None, :]
    mask = real & (c < 2 * HALF)
    x = tl.load(qkv + b * qkv_b + t * qkv_t + (above + h) * qkv_h + c, mask, other=0.0).to(tl.float32)
    row = (b * T + t) * K + h
    if gate is not None:
        s = tl.sigmoid(tl.load(gate + row, real, other=0.0).to(tl.float32))
        x += 3 * s * tl.load(e + row * (2 * HALF) + c, mask, other=0.0).to(tl.float32)
    tl.store(v + row * (2 * HALF) + c, x.to(v.dtype.element_ty), mask)


@jit
def _qkv_forward_kernel(
    qkv, cos, sin, gate, e, q, k, v, rstd, gain, eps, qkv_b, qkv_t, qkv_h, cos_b, cos_t, B, T, H, K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gain, eps = tl.cast(gain, tl.float32), tl.cast(eps, tl.float32)
    program, of_q, of_k = tl.program_id(0), tl.cdiv(B * T * H, ROWS), tl.cdiv(B * T * K, ROWS)
    if program < of_q:
        _rotate_rows(
            qkv, cos, sin, q, rstd, gain, eps, program * ROWS, 0,
            qkv_b, qkv_t, qkv_h, cos_b, cos_t, B, T, H, H + K, HALF, ROWS, BLOCK,
        )  # fmt: skip
    elif program < of_q + of_k:
        _rotate_rows(
            qkv, cos, sin, k, rstd, gain, eps, (program - of_q) * ROWS, H,
            qkv_b, qkv_t, qkv_h, cos_b, cos_t, B, T, K, H + K, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _value_rows(
            qkv, gate, e, v, (program - of_q - of_k) * ROWS, H + K, qkv_b, qkv_t, qkv_h, B, T, K,
            HALF, ROWS, BLOCK,
        )  # fmt: skip


@jit
def _rotate_back_rows(
    dy, y, cos, sin, rstd, dqkv, gain, first, above, dy_b, dy_t, dy_h, cos_b, cos_t, B, T, H, H_and_K, N,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, t, h, real = _place(first, B, T, H, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = real & (c < HALF)
    dy += b * dy_b + t * dy_t + h * dy_h + c
    da = tl.load(dy, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK), as all that follow
    db = tl.load(dy + HALF, mask, other=0.0).to(tl.float32)
    y += ((b * T + t) * H + h) * (2 * HALF) + c
    ya = tl.load(y, mask, other=0.0).to(tl.float32)
    yb = tl.load(y + HALF, mask, other=0.0).to(tl.float32)
    r = gain * tl.load(rstd + (b * T + t) * H_and_K + above + h, real, other=0.0)
    mean = tl.sum(ya * da + yb * db, 1, keep_dims=True) / (2 * HALF * gain * gain)
    da, db = r * (da - ya * mean), r * (db - yb * mean)
    angle = b * cos_b + t * cos_t + c
    cosine = tl.load(cos + angle, mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask, other=0.0).to(tl.float32)
    out = dqkv + ((b * T + t) * N + above + h) * (2 * HALF) + c
    tl.store(out, (da * cosine - db * sine).to(dqkv.dtype.element_ty), mask)
    tl.store(out + HALF, (da * sine + db * cosine).to(dqkv.dtype.element_ty), mask)


@jit
def _value_back_rows(
    dv, gate, e, dqkv, dgate, de, first, above, dv_b, dv_t, dv_h, B, T, K, N,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, t, h, real = _place(first, B, T, K, ROWS)
    c = tl.arange(0, 2 * BLOCK)[None, :]
    mask = real & (c < 2 * HALF)
    dy = tl.load(dv + b * dv_b + t * dv_t + h * dv_h + c, mask, other=0.0).to(tl.float32)
    tl.store(dqkv + ((b * T + t) * N + above + h) * (2 * HALF) + c, dy.to(dqkv.dtype.element_ty), mask)
    if gate is not None:
        row = (b * T + t) * K + h
        s = tl.sigmoid(tl.load(gate + row, real, other=0.0).to(tl.float32))
        added = tl.load(e + row * (2 * HALF) + c, mask, other=0.0).to(tl.float32)
        dot = tl.sum(added * dy, 1, keep_dims=True)
        tl.store(dgate + row, (3 * s * (1 - s) * dot).to(dgate.dtype.element_ty), real)
        tl.store(de + row * (2 * HALF) + c, (3 * s * dy).to(de.dtype.element_ty), mask)


@jit
def _qkv_backward_kernel(
    dq, dk, dv, q, k, cos, sin, gate, e, rstd, dqkv, dgate, de, gain,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, cos_b, cos_t, B, T, H, K,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gain = tl.cast(gain, tl.float32)
    program, of_q, of_k = tl.program_id(0), tl.cdiv(B * T * H, ROWS), tl.cdiv(B * T * K, ROWS)
    if program < of_q:
        _rotate_back_rows(
            dq, q, cos, sin, rstd, dqkv, gain, program * ROWS, 0,
            dq_b, dq_t, dq_h, cos_b, cos_t, B, T, H, H + K, H + 2 * K, HALF, ROWS, BLOCK,
        )  # fmt: skip
    elif program < of_q + of_k:
        _rotate_back_rows(
            dk, k, cos, sin, rstd, dqkv, gain, (program - of_q) * ROWS, H,
            dk_b, dk_t, dk_h, cos_b, cos_t, B, T, K, H + K, H + 2 * K, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _value_back_rows(
            dv, gate, e, dqkv, dgate, de, (program - of_q - of_k) * ROWS, H + K,
            dv_b, dv_t, dv_h, B, T, K, H + 2 * K, HALF, ROWS, BLOCK,
        )  # fmt: skip


def _qkv_tiles(block: int, _: Device) -> list[Tile]:
    """As many rows as have about this many elements in each half, and this many per thread."""
    tiles = []
    for elements, warps in ((2048, 4), (1024, 2), (4096, 8), (2048, 2)):
        tiles.append(Tile({"ROWS": max(1, elements // block), "BLOCK": block}, warps))
    return tiles

"""RMSNorm kernels for rows that do not fit in a program's registers: each row is read twice.

Each program handles one row; its second pass reads from the L2 cache. No program can hold the weight's
gradient for a whole row, so a third kernel computes it by columns. Bytes for M rows of N elements of e bytes:
those of rms_norm.py, plus 2 M N e for the gradient of a weight.
"""
# M rows, N width of a row

from __future__ import annotations

from hotlap.kernels.dispatch import Device, jit, tl
from hotlap.kernels.tiles import Tile


def rms_norm_wide_tiles(_: int, __: Device) -> list[Tile]:
    return [Tile({"BLOCK": block}, warps) for block, warps in ((4096, 8), (2048, 4), (8192, 16))]


def rms_norm_columns_tiles(_: int, __: Device) -> list[Tile]:
    return [Tile({"ROWS": rows, "BLOCK": block}, 4) for rows, block in ((8, 512), (16, 256), (4, 1024))]


@jit
def _rms_norm_wide_forward_kernel(
    x, residual, weight, y, total, rstd, stride_x, stride_residual, M, N, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * stride_x + column, column < N, other=0.0).to(tl.float32)
        if residual is not None:
            v += tl.load(residual + row * stride_residual + column, column < N, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty)
            tl.store(total + row * N + column, v, column < N)
            v = v.to(tl.float32)
        squares += v * v
    r = tl.rsqrt(tl.sum(squares, 0) / N + tl.cast(eps, tl.float32))
    tl.store(rstd + row, r)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * stride_x + column, column < N, other=0.0).to(tl.float32)
        if residual is not None:  # added again: another thread may have overwritten it
            v += tl.load(residual + row * stride_residual + column, column < N, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty).to(tl.float32)
        v *= r
        if weight is not None:
            v *= tl.load(weight + column, column < N, other=0.0).to(tl.float32)
        tl.store(y + row * N + column, v.to(y.dtype.element_ty), column < N)


@jit
def _rms_norm_wide_backward_kernel(
    dy, dtotal, x, weight, rstd, dx, stride_dy, stride_dtotal, stride_x, N, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + row)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        n = tl.load(x + row * stride_x + column, column < N, other=0.0).to(tl.float32) * r
        g = tl.load(dy + row * stride_dy + column, column < N, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + column, column < N, other=0.0).to(tl.float32)
        dot += g * n
    mean = tl.sum(dot, 0) / N
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        n = tl.load(x + row * stride_x + column, column < N, other=0.0).to(tl.float32) * r
        g = tl.load(dy + row * stride_dy + column, column < N, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + column, column < N, other=0.0).to(tl.float32)
        d = r * (g - n * mean)
        if dtotal is not None:
            d += tl.load(dtotal + row * stride_dtotal + column, column < N, other=0.0).to(tl.float32)
        tl.store(dx + row * N + column, d.to(dx.dtype.element_ty), column < N)


@jit
def _rms_norm_columns_kernel(
    dy, x, rstd, dweight, stride_dy, stride_x, M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Program (i, j) sums dy n over every j-th group of rows, for the columns of block i.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    share = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(1) * ROWS, M, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        mask = (row[:, None] < M) & (column < N)
        n = tl.load(x + at * stride_x + column, mask, other=0.0).to(tl.float32)
        n *= tl.load(rstd + row, row < M, other=0.0)[:, None]
        share += n * tl.load(dy + at * stride_dy + column, mask, other=0.0).to(tl.float32)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dweight + tl.program_id(1).to(tl.int64) * N + column, tl.sum(share, 0), column < N)

"""RMSNorm kernels for rows that fit in a program's registers, and their tiles. See rms_norm.py."""
# M rows, N width of a row, a and b scales of x and residual

from __future__ import annotations

from hotlap.kernels.dispatch import Device, jit, tl
from hotlap.kernels.tiles import Tile


@jit
def _rms_norm_forward_kernel(
    x, residual, a, b, weight, y, total, rstd, stride_x, stride_residual, M, N, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    at = row.to(tl.int64)[:, None]  # offsets pass 2^31
    mask = (row[:, None] < M) & (column < N)
    v = tl.load(x + at * stride_x + column, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    if residual is not None:
        added = tl.load(residual + at * stride_residual + column, mask, other=0.0).to(tl.float32)
        if a is not None:
            v, added = v * tl.load(a).to(tl.float32), added * tl.load(b).to(tl.float32)
        v = (v + added).to(total.dtype.element_ty)  # normalise the rounded sum: the next block adds to it
        tl.store(total + at * N + column, v, mask)
        v = v.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 1) / N + tl.cast(eps, tl.float32))  # (ROWS,)
    tl.store(rstd + row, r, row < M)
    v *= r[:, None]
    if weight is not None:
        v *= tl.load(weight + column, column < N, other=0.0).to(tl.float32)
    tl.store(y + at * N + column, v.to(y.dtype.element_ty), mask)


@jit
def _rms_norm_backward_kernel(
    dy, dtotal, x, residual, a, b, weight, rstd, dx, dresidual, dweight, dscales,
    stride_dy, stride_dtotal, stride_x, stride_residual, M, N,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs stride over the rows. Each accumulates its part of dweight, and of da and db (dscales), in
    # registers and writes it once. What is normalised is x, or with scales a x + b residual.
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        w = tl.load(weight + column, column < N, other=0.0).to(tl.float32)
        share = tl.zeros((ROWS, BLOCK), tl.float32)
    if a is not None:
        scale, scale_added = tl.load(a).to(tl.float32), tl.load(b).to(tl.float32)
        da, db = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        mask = (row[:, None] < M) & (column < N)
        v = tl.load(x + at * stride_x + column, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
        n = v
        if a is not None:
            added = tl.load(residual + at * stride_residual + column, mask, other=0.0).to(tl.float32)
            n = (scale * v + scale_added * added).to(x.dtype.element_ty).to(tl.float32)  # rounded as forward
        g = tl.load(dy + at * stride_dy + column, mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, row < M, other=0.0)[:, None]
        n *= r
        if weight is not None:
            share += g * n
            g *= w
        d = r * (g - n * (tl.sum(g * n, 1) / N)[:, None])
        if dtotal is not None:
            d += tl.load(dtotal + at * stride_dtotal + column, mask, other=0.0).to(tl.float32)
        if a is not None:
            da += tl.sum(d * v, 1)
            db += tl.sum(d * added, 1)
            tl.store(dresidual + at * N + column, (scale_added * d).to(dresidual.dtype.element_ty), mask)
            d *= scale
        tl.store(dx + at * N + column, d.to(dx.dtype.element_ty), mask)
    if a is not None:
        tl.store(dscales + program, tl.sum(da, 0))
        tl.store(dscales + programs + program, tl.sum(db, 0))
    if weight is not None:
        column = tl.arange(0, BLOCK)
        tl.store(dweight + program.to(tl.int64) * N + column, tl.sum(share, 0), column < N)


WIDEST = 16384  # elements of a row that a program holds without spilling;
WIDEST_WEIGHTED = WIDEST_SCALED = 8192  # the same if it also holds its part of dweight, or the residual


def _tile(
    block: int, device: Device, elements: int, each: int, per_processor: int = 1, stages: int = 1
) -> Tile:
    """As many rows as have about `elements` elements, about `each` of them per thread."""
    rows = max(1, elements // block)
    warps = min(512 // device.warp, max(1, rows * block // (device.warp * each)))
    ahead = 12 * rows * block * (stages - 1)  # bytes of x, dy and dtotal that a loop fetches, in float32
    shared = ahead + (9216 if rows > 1 else 1024) if ahead else 0  # with what sums over threads, and rows
    return Tile({"ROWS": rows, "BLOCK": block}, warps, stages, per_processor, shared)


def _rms_norm_forward_tiles(block: int, device: Device) -> list[Tile]:
    return [_tile(block, device, *sizes) for sizes in ((4096, 16), (2048, 16), (4096, 32), (8192, 32))]


def _rms_norm_backward_tiles(block: int, device: Device) -> list[Tile]:
    return [_tile(block, device, *sizes) for sizes in ((2048, 16), (4096, 16), (1024, 8))]


def _rms_norm_weighted_backward_tiles(block: int, device: Device) -> list[Tile]:
    """Persistent programs, as many per processor as its registers hold. Where only one fits, a row is loaded
    while the one before it is computed.
    """
    if block > 4096:
        return [_tile(block, device, block, 16, stages=stages) for stages in (2, 3, 1)]
    sizes = ((4096, 16, 2), (2048, 16, 4), (4096, 32, 2))
    return [
        _tile(block, device, elements, each, per_processor=programs, stages=stages)
        for elements, each, programs in sizes
        for stages in (1, 2)
    ]


def _rms_norm_scaled_backward_tiles(block: int, device: Device) -> list[Tile]:
    """Persistent programs too, as many per processor as hold 8192 elements."""
    sizes = ((2048, 16), (4096, 16), (4096, 32))
    return [_tile(block, device, elements, each, 8192 // max(elements, block)) for elements, each in sizes]

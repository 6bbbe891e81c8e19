"""The Triton kernel of decode_linear.py, and the blocks it may take.

Each program streams a few rows of W over their whole depth. Its warps share the depth and add their sums at
the end, so no sum crosses programs, and the result does not depend on the order in which they run. The norm
is a factor of each row: the mean square is summed beside the product and scales its result.

A second form of the kernel starts while the kernel before it runs, and meanwhile fetches its weight into the
L2 cache (programmatic dependent launch, from compute capability 9.0). It is taken only where `hotlap bench
tune` finds it faster, which it did not on an H100.
"""
# R rows (tokens), D inner dimension, N outputs, K gates of V, which read G channels

from __future__ import annotations

from dataclasses import replace

from hotlap.kernels.dispatch import Device, jit, tl
from hotlap.kernels.tiles import Tile

ROWS = 16  # of x, as many as a matmul instruction takes
RESERVE = 2 << 10  # bytes of shared memory for sums over warps and the like


@jit
def _mix(p, q, a, b):
    """a p + b q, rounded as the next layer adds to it."""
    return (a * p.to(tl.float32) + b * q.to(tl.float32)).to(p.dtype)


@jit
def _store_gates(
    x, a, b, x0, gate, gates, rstd, R, D, K, G,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    r, k, g = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_G)[None, :]
    real = (r < R) & (g < G)
    p = tl.load(x + r * D + g, real, other=0.0)  # (ROWS, BLOCK_G)
    if x0 is not None:
        p = _mix(p, tl.load(x0 + r * D + g, real, other=0.0), a, b)
    v = tl.load(gate + k[:, None] * G + g, (k[:, None] < K) & (g < G), other=0.0)  # (BLOCK_K, BLOCK_G)
    out = tl.sum(p.to(tl.float32)[:, None, :] * v.to(tl.float32)[None, :, :], 2) * rstd  # (ROWS, BLOCK_K)
    tl.store(gates + r * K + k[None, :], out.to(gates.dtype.element_ty), (r < R) & (k[None, :] < K))


@jit
def _decode_linear_kernel(
    x, a, b, x0, w, scales, gate, residual, y, total, gates, w_n, R, N, D, K, G, eps,
    NORM: tl.constexpr, RELU2: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y (R, N) from rows of w (N, D); everything else is contiguous. Each warp takes
    BLOCK_D of every WARPS * BLOCK_D along D. Where total or gates are asked for, the last program writes
    them; it has no columns of y.
    """
    program, last = tl.program_id(0), tl.num_programs(0) - 1
    n = (program * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)  # offsets pass 2^31
    d = tl.arange(0, WARPS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    r = tl.arange(0, ROWS)
    left = r[None, :, None] * D + d[:, None, :]  # (WARPS, ROWS, BLOCK_D)
    right = w + n[None, None, :] * w_n + d[:, :, None]  # (WARPS, BLOCK_D, BLOCK_N)
    if x0 is not None:
        a = tl.load(a).to(x.dtype.element_ty).to(tl.float32)
        b = tl.load(b).to(x.dtype.element_ty).to(tl.float32)
    sums = tl.zeros((WARPS, ROWS, BLOCK_N), tl.float32)
    squares = tl.zeros((WARPS, ROWS), tl.float32)
    for start in range(0, D, WARPS * BLOCK_D):
        inside = d < D - start
        mask = (r < R)[None, :, None] & inside[:, None, :]
        p = tl.load(x + start + left, mask, other=0.0)
        q = tl.load(right, inside[:, :, None] & (n < N)[None, None, :], other=0)
        if scales is not None:
            q = q.to(tl.float32).to(p.dtype)  # exact
        if x0 is not None:
            p = _mix(p, tl.load(x0 + start + left, mask, other=0.0), a, b)
            tl.store(total + start + left, p, mask & (program == last))
        if NORM:
            wide = p.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
        sums = tl.dot(p, q, sums, input_precision="ieee")
        right += WARPS * BLOCK_D
    out = tl.sum(sums, 0)  # (ROWS, BLOCK_N)
    if scales is not None:
        out *= tl.load(scales + n, n < N, other=0.0)[None, :]
    if NORM:
        rstd = tl.rsqrt(tl.sum(squares, 0) / D + tl.cast(eps, tl.float32))[:, None]
        out *= rstd
        if gate is not None and program == last:
            _store_gates(x, a, b, x0, gate, gates, rstd, R, D, K, G, ROWS, BLOCK_K, BLOCK_G)
    if RELU2:
        out = tl.where(out < 0, 0.0, out)  # unlike a maximum, keeps NaN
        out *= out
    place = r[:, None] * tl.cast(N, tl.int64) + n[None, :]
    mask = (r < R)[:, None] & (n < N)[None, :]
    if residual is not None:
        out += tl.load(residual + place, mask, other=0.0).to(tl.float32)
    tl.store(y + place, out.to(y.dtype.element_ty), mask)


@jit
def _prefetch_rows(w, w_n, N, D, WARPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Fetch this program's rows of w (N, D) into the L2 cache, a line of 128 bytes by each thread at once."""
    LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth  # elements
    LINES: tl.constexpr = 32 * WARPS // BLOCK_N
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[:, None]
    for start in range(0, D, LINES * LINE):
        d = tl.minimum(start + LINE * tl.arange(0, LINES), D - 1)[None, :]
        address = (w + n * w_n + d).to(tl.int64)  # (BLOCK_N, LINES)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // no result in $0", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )


@jit
def _decode_linear_early_kernel(
    x, a, b, x0, w, scales, gate, residual, y, total, gates, w_n, R, N, D, K, G, eps,
    NORM: tl.constexpr, RELU2: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`_decode_linear_kernel`, launched with launch_pdl=True: it may start before the kernel before it ends.

    Until the wait it writes nothing, and reads nothing: a prefetch delivers no values, and all that write
    W later do so through the same L2 cache. The wait ends when the kernel before has ended and its writes are
    seen. That kernel waits in turn before it ends, if it is of this form, or else has started after those
    before it. So all earlier kernels have ended then. A kernel of this form that follows may start once all
    programs are past the wait. They run by then, so it takes no processor that they need.
    """
    _prefetch_rows(w, w_n, N, D, WARPS, BLOCK_N)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    _decode_linear_kernel(
        x, a, b, x0, w, scales, gate, residual, y, total, gates, w_n, R, N, D, K, G, eps,
        NORM, RELU2, BLOCK_K, BLOCK_G, ROWS, BLOCK_N, WARPS, BLOCK_D,
    )  # fmt: skip


def _tiles(shapes: list[tuple[int, int, int, int]], rows: int) -> list[Tile]:
    """Tiles of (N, D of a warp, warps, stages). All stages but one are in flight, with x and x0."""
    tiles = []
    for n, d, warps, stages in shapes:
        blocks = {"ROWS": rows, "BLOCK_N": n, "WARPS": warps, "BLOCK_D": d}
        flying = (stages - 1) * (n + 2 * rows)
        tiles.append(Tile(blocks, warps, stages, shared=2 * warps * d * (flying + rows) + RESERVE))
    return tiles


def _with_early(tiles: list[Tile], device: Device) -> list[Tile]:
    """Tiles, and the first two again in the form that starts early, where the GPU can do that."""
    early = tiles[:2] if device.compute >= 90 else ()
    return [*tiles, *(replace(tile, kernel="_decode_linear_early_kernel") for tile in early)]


def _decode_linear_wide_tiles(rows: int, device: Device) -> list[Tile]:
    """For weights of two programs a processor or more: 50 to 100 KB in flight on each processor of an H100,
    where bandwidth times latency is 20 to 30.
    """
    if device.warp == 64:  # AMD, whose matmul instructions take no less than 16 rows and columns
        return _tiles([(16, 64, 4, 3), (16, 64, 4, 2), (32, 64, 4, 2)], ROWS)
    if rows == 1:
        shapes = [(16, 128, 4, 4), (16, 128, 4, 3), (16, 256, 4, 3), (8, 128, 4, 4), (16, 64, 4, 6)]
    else:
        shapes = [(32, 64, 4, 4), (16, 64, 4, 4), (32, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 3)]
    return _with_early(_tiles(shapes, rows), device)


def _decode_linear_narrow_tiles(rows: int, device: Device) -> list[Tile]:
    """For fewer rows of W: smaller blocks, so that more processors have one, and more of them in flight."""
    if device.warp == 64:
        return _decode_linear_wide_tiles(rows, device)
    if rows == 1:
        shapes = [(8, 128, 4, 5), (8, 128, 4, 4), (8, 256, 4, 4), (8, 128, 8, 4), (16, 128, 4, 4)]
    else:
        shapes = [(8, 64, 4, 5), (8, 64, 4, 4), (16, 64, 4, 4), (16, 64, 8, 3), (16, 64, 4, 3)]
    return _with_early(_tiles(shapes, rows), device)

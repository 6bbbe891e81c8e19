"""Products of a few rows with a large weight, as in decoding, fused with what surrounds them in a block.

    norm_linear:      total = a x + b x0,  y = rms_norm(total) W^T,  and maybe relu(y)^2
    linear_residual:  y = x W^T + residual

Bound by memory: N D e bytes of W, for elements of e bytes. Each program streams a few rows of W over their
whole depth. Its warps share the depth and add their sums at the end, so no sum crosses programs, and the
result does not depend on the order in which they run. The norm is a factor of each row: the mean square is
summed beside the product and scales its result. So the normalised row is not rounded to the dtype of x before
the product, as the reference does, which changes y by at most 2^-9 sum |n W| in bfloat16 (n the normalised
row, 2^-12 in float16).

For inference: where a gradient may be needed, for more than ROWS rows, for weights of another dtype than x's,
and for float32 on a GPU (no tensor cores), both functions are the reference.
"""
# R rows (tokens), D inner dimension, N outputs

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.dispatch import (
    INTERPRETED,
    Device,
    device_facts,
    jit,
    kernel_op,
    tl,
    triton,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import EPS, rms_norm_ref
from hotlap.kernels.tiles import Case, Table, Tile, pick_tile, type_name

ROWS = 16  # of x, as many as a matmul instruction takes
RESERVE = 2 << 10  # bytes of shared memory for sums over warps and the like
Mix = tuple[Tensor, Tensor, Tensor]  # a, b (one element each) and x0 (as x)


def norm_linear_ref(
    x: Tensor, weight: Tensor, mix: Mix | None = None, squared_relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The specification: each step is rounded to the dtype of x."""
    if mix is not None:
        a, b, x0 = mix
        x = a.to(x.dtype) * x + b.to(x.dtype) * x0
    y = F.linear(rms_norm_ref(x), weight.to(x.dtype))
    return (relu2(y) if squared_relu else y), x


def linear_residual_ref(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The specification."""
    return residual + F.linear(x, weight.to(x.dtype))


@jit
def _decode_linear_kernel(
    x, a, b, x0, w, residual, y, total, w_n, R, N, D, eps,
    NORM: tl.constexpr, RELU2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y (R, N) from rows of w (N, D); everything else is contiguous. Each warp takes
    BLOCK_D of every WARPS * BLOCK_D along D. The first program writes total.
    """
    program = tl.program_id(0)
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
        q = tl.load(right, inside[:, :, None] & (n < N)[None, None, :], other=0.0)
        if x0 is not None:
            p = a * p.to(tl.float32) + b * tl.load(x0 + start + left, mask, other=0.0).to(tl.float32)
            p = p.to(x.dtype.element_ty)  # normalise the rounded sum: the next layer adds to it
            tl.store(total + start + left, p, mask & (program == 0))
        if NORM:
            wide = p.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
        sums = tl.dot(p, q, sums, input_precision="ieee")
        right += WARPS * BLOCK_D
    out = tl.sum(sums, 0)  # (ROWS, BLOCK_N)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 0) / D + tl.cast(eps, tl.float32))[:, None]
    if RELU2:
        out = tl.where(out < 0, 0.0, out)  # unlike a maximum, keeps NaN
        out *= out
    place = r[:, None] * tl.cast(N, tl.int64) + n[None, :]
    mask = (r < R)[:, None] & (n < N)[None, :]
    if residual is not None:
        out += tl.load(residual + place, mask, other=0.0).to(tl.float32)
    tl.store(y + place, out.to(y.dtype.element_ty), mask)


def _tiles(shapes: list[tuple[int, int, int, int]], rows: int) -> list[Tile]:
    """Tiles of (N, D of a warp, warps, stages). All stages but one are in flight, with x and x0."""
    tiles = []
    for n, d, warps, stages in shapes:
        blocks = {"ROWS": rows, "BLOCK_N": n, "WARPS": warps, "BLOCK_D": d}
        flying = (stages - 1) * (n + 2 * rows)
        tiles.append(Tile(blocks, warps, stages, shared=2 * warps * d * (flying + rows) + RESERVE))
    return tiles


def _decode_linear_wide_tiles(rows: int, device: Device) -> list[Tile]:
    """For weights of two programs a processor or more. The order is calculated, not measured: 50 to 100 KB
    in flight on each processor of an H100, where bandwidth times latency is 20 to 30.
    """
    if device.warp == 64:  # AMD, whose matmul instructions take no less than 16 rows and columns
        return _tiles([(16, 64, 4, 3), (16, 64, 4, 2), (32, 64, 4, 2)], ROWS)
    if rows == 1:
        return _tiles([(16, 128, 4, 4), (16, 128, 4, 3), (16, 256, 4, 3), (8, 128, 4, 4), (16, 64, 4, 6)], 1)
    return _tiles([(32, 64, 4, 4), (16, 64, 4, 4), (32, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 3)], ROWS)


def _decode_linear_narrow_tiles(rows: int, device: Device) -> list[Tile]:
    """For fewer rows of W: smaller blocks, so that more processors have one, and more of them in flight."""
    if device.warp == 64:
        return _decode_linear_wide_tiles(rows, device)
    if rows == 1:
        return _tiles([(8, 128, 4, 5), (8, 128, 4, 4), (8, 256, 4, 4), (8, 128, 8, 4), (16, 128, 4, 4)], 1)
    return _tiles([(8, 64, 4, 5), (8, 64, 4, 4), (16, 64, 4, 4), (16, 64, 8, 3), (16, 64, 4, 3)], ROWS)


def _table(N: int, device: Device) -> Table:
    programs = N // 16
    return _decode_linear_narrow_tiles if programs < 2 * device.processors else _decode_linear_wide_tiles


def _product(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x0: Tensor | None,
    residual: Tensor | None,
    norm: bool,
    squared_relu: bool,
) -> tuple[Tensor, Tensor]:
    """y (..., N), and a x + b x0, which is empty where there is no x0."""
    y, total = _empty(x, weight, a, b, x0)
    if y.numel() == 0:
        return y, total
    N, D = weight.shape
    R, device = math.prod(x.shape[:-1]), device_facts(x.device)
    x, x0, residual = (t if t is None else t.contiguous() for t in (x, x0, residual))  # a few rows
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = pick_tile(_table(N, device), 1 if R == 1 else ROWS, device)
    with torch.cuda.device_of(x):
        wrap_triton(_decode_linear_kernel)[(triton.cdiv(N, tile.blocks["BLOCK_N"]),)](
            x, a, b, x0, weight, residual, y, None if x0 is None else total, weight.stride(0), R, N, D, EPS,
            NORM=norm, RELU2=squared_relu, **tile.arguments,
        )  # fmt: skip
    return y, total


def _empty(x: Tensor, weight: Tensor, a, b, x0, *_) -> tuple[Tensor, Tensor]:
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    return y, torch.empty(0 if x0 is None else x.shape, dtype=x.dtype, device=x.device)


_decode_linear = kernel_op("decode_linear", _product, _empty)


def _fuses(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the product of x (..., D) and weight (N, D), with what is fused with it, runs the kernel."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, *others))
    few = math.prod(x.shape[:-1]) <= ROWS and weight.dtype == x.dtype
    return few and not learns and use_triton(x) and (x.dtype != torch.float32 or INTERPRETED)


def norm_linear(
    x: Tensor, weight: Tensor, mix: Mix | None = None, squared_relu: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, total): y = rms_norm(total) weight^T, or its relu(.)^2, where total = a x + b x0, or x without mix.

    x, x0: (..., D); weight: (N, D); a, b: one element each, rounded to the dtype of x. Returns (..., N) and
    (..., D) in that dtype.
    """
    _check(x, weight)
    if mix is not None and (mix[2].shape != x.shape or mix[2].dtype != x.dtype):
        given = f"x0 is {tuple(mix[2].shape)} {mix[2].dtype}"
        raise ValueError(f"{given}; it has to be as x, {tuple(x.shape)} {x.dtype}")
    if not _fuses(x, weight, *(mix or ())):
        return norm_linear_ref(x, weight, mix, squared_relu)
    y, total = _decode_linear(x, weight, *(mix or (None, None, None)), None, True, squared_relu)
    return y, x if mix is None else total


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + x weight^T of x (..., D), weight (N, D) and residual (..., N), in the dtype of x."""
    _check(x, weight)
    if residual.shape != (*x.shape[:-1], weight.shape[0]) or residual.dtype != x.dtype:
        given = f"residual is {tuple(residual.shape)} {residual.dtype}"
        raise ValueError(
            f"{given}; it has to be as the product, {(*x.shape[:-1], weight.shape[0])} {x.dtype}"
        )
    if not _fuses(x, weight, residual):
        return linear_residual_ref(x, weight, residual)
    return _decode_linear(x, weight, None, None, None, residual, False, False)[0]


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; needed are (..., D) and (N, D)"
        )


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: the products of d24's blocks with one row and 16; none in float32,
    which has no tensor cores. The tuner uses a new weight each time, which no cache holds.
    """
    if dtype == torch.float32:
        return []
    t, absent = f"*{type_name(dtype)}", dict.fromkeys(("a", "b", "x0", "residual", "total"))
    common = {"x": t, "w": t, "y": t, "w_n": "i32", "N": "i32", "D": "i32", "eps": "fp64", **absent}
    forms = {
        "norm, relu2": (6144, 1536, {"NORM": True, "RELU2": True}),
        "residual": (1536, 6144, {"NORM": False, "RELU2": False, "residual": t}),
        "mix, norm": (4608, 1536, {"NORM": True, "RELU2": False, "x0": t, "total": t, "a": t, "b": t}),
    }

    def run(rows: int, N: int, D: int, form: dict, device: torch.device):
        weights = torch.randn(12, N, D, device=device, dtype=dtype) / D**0.5  # 12: more than caches hold
        x, residual = (torch.randn(rows, width, device=device, dtype=dtype) for width in (D, N))
        mix = (x[0, 0], x[0, 1], x) if "x0" in form else (None, None, None)
        added = residual if "residual" in form else None

        def launch():
            for weight in weights:
                _product(x, weight, *mix, added, form["NORM"], form["RELU2"])

        return launch

    found = []
    for variant, (N, D, form) in forms.items():
        table = _decode_linear_narrow_tiles if N == 1536 else _decode_linear_wide_tiles
        for rows in (1, ROWS):
            arguments = common | form | {"R": 1 if rows == 1 else "i32"}
            start = functools.partial(run, rows, N, D, form)
            found.append(Case("_decode_linear_kernel", arguments, table, rows, start, variant, small=True))
    return found

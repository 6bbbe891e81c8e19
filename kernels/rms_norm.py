"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich, 2019).

Rows are normalised in float32 and rounded once. With r = 1 / sqrt(mean(x^2) + eps), n = x r, g = dy weight:

    dx = r (g - n mean(g n))        dweight = sum over rows of dy n

Bound by memory. Bytes for M rows of N elements of e bytes: forward 2 M N e, backward 3 M N e; with the
residual add 4 M N e each. About 4 M N FLOPs forward and 8 M N backward. Rows wider than a program's registers
take two passes: rms_norm_wide.py.
"""
# M rows, N width of a row

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, triton, use_triton, wrap_triton
from hotlap.kernels.rms_norm_wide import (
    _rms_norm_columns_kernel,
    _rms_norm_wide_backward_kernel,
    _rms_norm_wide_forward_kernel,
    rms_norm_columns_tiles,
    rms_norm_wide_tiles,
)
from hotlap.kernels.tiles import Case, Tile, as_rows, next_power_of_2, pick_tile, type_name

EPS = 1e-6


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """The specification, with statistics in float32 or wider. x: (..., D), weight: (D,) or None; returns x's
    dtype.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def rms_norm_residual_ref(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The specification: the sum is rounded to the dtype of x before it is normalised."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


@jit
def _rms_norm_forward_kernel(
    x, residual, weight, y, total, rstd, stride_x, stride_residual, M, N, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    at = row.to(tl.int64)[:, None]  # offsets pass 2^31
    mask = (row[:, None] < M) & (column < N)
    v = tl.load(x + at * stride_x + column, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    if residual is not None:
        v += tl.load(residual + at * stride_residual + column, mask, other=0.0).to(tl.float32)
        v = v.to(total.dtype.element_ty)  # normalise the rounded sum: the next block adds to it
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
    dy, dtotal, x, weight, rstd, dx, dweight, stride_dy, stride_dtotal, stride_x, M, N,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs stride over the rows. Each accumulates its part of dweight in registers and writes it once.
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        w = tl.load(weight + column, column < N, other=0.0).to(tl.float32)
        share = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        mask = (row[:, None] < M) & (column < N)
        n = tl.load(x + at * stride_x + column, mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
        g = tl.load(dy + at * stride_dy + column, mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, row < M, other=0.0)[:, None]
        n *= r
        if weight is not None:
            share += g * n
            g *= w
        d = r * (g - n * (tl.sum(g * n, 1) / N)[:, None])
        if dtotal is not None:
            d += tl.load(dtotal + at * stride_dtotal + column, mask, other=0.0).to(tl.float32)
        tl.store(dx + at * N + column, d.to(dx.dtype.element_ty), mask)
    if weight is not None:
        column = tl.arange(0, BLOCK)
        tl.store(dweight + program.to(tl.int64) * N + column, tl.sum(share, 0), column < N)


WIDEST = 16384  # elements of a row that a program holds without spilling;
WIDEST_WEIGHTED = 8192  # the same if it also holds its part of dweight


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


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, x + residual (where there is a residual), and the reciprocal norms (M,)."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, total, rstd.fill_(eps**-0.5)
    rows, added, stride = as_rows(x), None, 0
    if residual is not None:
        added = as_rows(residual)
        stride = added.stride(0)
    block, device = next_power_of_2(N), device_facts(x.device)
    arguments = (rows, added, weight, y, total, rstd, rows.stride(0), stride, M, N, eps)
    with torch.cuda.device_of(x):
        if block > WIDEST:
            tile = pick_tile(rms_norm_wide_tiles, 0, device)
            wrap_triton(_rms_norm_wide_forward_kernel)[(M,)](*arguments, **tile.arguments)
        else:
            tile = pick_tile(_rms_norm_forward_tiles, block, device)
            grid = (triton.cdiv(M, tile.blocks["ROWS"]),)
            wrap_triton(_rms_norm_forward_kernel)[grid](*arguments, **tile.arguments)
    return y, total, rstd


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty for a missing weight."""
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, dx.new_empty(0) if weight is None else torch.zeros_like(weight)
    x, dy, added, stride = as_rows(x), as_rows(dy), None, 0
    if dtotal is not None:
        added = as_rows(dtotal)
        stride = added.stride(0)
    block, device = next_power_of_2(N), device_facts(x.device)
    strides = (dy.stride(0), stride, x.stride(0))
    with torch.cuda.device_of(x):
        if block > (WIDEST if weight is None else WIDEST_WEIGHTED):
            tile = pick_tile(rms_norm_wide_tiles, 0, device)
            wrap_triton(_rms_norm_wide_backward_kernel)[(M,)](
                dy, added, x, weight, rstd, dx, *strides, N, **tile.arguments
            )
            return dx, dx.new_empty(0) if weight is None else _columns(dy, x, rstd).to(weight.dtype)
        if weight is None:
            tile, shares = pick_tile(_rms_norm_backward_tiles, block, device), None
            programs = triton.cdiv(M, tile.blocks["ROWS"])
        else:
            tile = pick_tile(_rms_norm_weighted_backward_tiles, block, device)
            programs = min(triton.cdiv(M, tile.blocks["ROWS"]), device.processors * tile.per_processor)
            shares = torch.empty((programs, N), dtype=torch.float32, device=x.device)
        wrap_triton(_rms_norm_backward_kernel)[(programs,)](
            dy, added, x, weight, rstd, dx, shares, *strides, M, N, STAGES=tile.stages, **tile.arguments
        )
        return dx, dx.new_empty(0) if weight is None else shares.sum(0).to(weight.dtype)


def _columns(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the weight for rows too wide to accumulate it in registers: partial sums over groups of
    rows, for four programs per processor.
    """
    M, N = x.shape
    device = device_facts(x.device)
    tile = pick_tile(rms_norm_columns_tiles, 0, device)
    across = triton.cdiv(N, tile.blocks["BLOCK"])
    down = min(triton.cdiv(4 * device.processors, across), triton.cdiv(M, tile.blocks["ROWS"]))
    shares = torch.empty((down, N), dtype=torch.float32, device=x.device)
    wrap_triton(_rms_norm_columns_kernel)[(across, down)](
        dy, x, rstd, shares, dy.stride(0), x.stride(0), M, N, **tile.arguments
    )
    return shares.sum(0)


def _forward_plain(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def _forward_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_rstd(x: Tensor) -> Tensor:
    return torch.empty(math.prod(x.shape[:-1]), dtype=torch.float32, device=x.device)


def _save_plain(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient_plain(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, None, x, weight, rstd)
    return dx, None if weight is None else dweight, None


def _save_residual(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient_residual(ctx, dy, dtotal, _):
    total, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dweight = _rms_norm_backward(dy, dtotal, total, weight, rstd)
    return dx, dx, None if weight is None else dweight, None


_rms_norm_backward = kernel_op(
    "rms_norm_backward",
    _backward,
    lambda dy, dtotal, x, weight, rstd: (_empty(x), x.new_empty(0) if weight is None else _empty(weight)),
)
_rms_norm = kernel_op(
    "rms_norm",
    _forward_plain,
    lambda x, weight, eps: (_empty(x), _fake_rstd(x)),
    _save_plain,
    _gradient_plain,
)
_rms_norm_residual = kernel_op(
    "rms_norm_residual",
    _forward_residual,
    lambda x, residual, weight, eps: (_empty(x), _empty(x), _fake_rstd(x)),
    _save_residual,
    _gradient_residual,
)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; rows of x are {x.shape[-1]} wide")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        given = f"residual is {tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"{given}; it has to be as x, {tuple(x.shape)} {x.dtype}")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """RMSNorm of x (..., D), scaled by weight (D,) where given. Same shape and dtype as x."""
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0] if use_triton(x) else rms_norm_ref(x, weight, eps)


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The residual add and the RMSNorm after it, in one pass: (normalised, new residual).

    x, residual: (..., D) of one dtype. The new residual, x + residual, is rounded to it before the norm.
    weight: (D,) or None.
    """
    _check(x, weight, residual)
    if use_triton(x):
        return _rms_norm_residual(x, residual, weight, eps)[:2]
    return rms_norm_residual_ref(x, residual, weight, eps)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: rows of 512 to 32768, plain, and with weight and residual."""
    t = f"*{type_name(dtype)}"

    def of(N: int, full: bool) -> list[Case]:
        extra = t if full else None
        sizes = dict.fromkeys(("stride_x", "stride_residual", "stride_dy", "stride_dtotal", "M", "N"), "i32")
        forward = {"x": t, "residual": extra, "weight": extra, "y": t, "total": extra, "rstd": "*fp32"}
        forward |= sizes | {"eps": "fp64"}
        backward = {"dy": t, "dtotal": extra, "x": t, "weight": extra, "rstd": "*fp32", "dx": t} | sizes
        backward |= {"dweight": "*fp32" if full else None}

        def inputs(device):
            x = torch.randn((1 << 26) // N, N, device=device, dtype=dtype)
            return x, torch.randn_like(x) if full else None, torch.randn_like(x[0]) if full else None

        def run_forward(device):
            x, residual, weight = inputs(device)
            return lambda: _forward(x, residual, weight, EPS)

        def run_backward(device):
            x, residual, weight = inputs(device)
            rstd = _forward(x, residual, weight, EPS)[2]
            return lambda: _backward(x, residual, x, weight, rstd)

        variant = "weight, residual" if full else ""
        if N > WIDEST:
            columns = backward | {"dweight": "*fp32"}
            return [
                Case("_rms_norm_wide_forward_kernel", forward, rms_norm_wide_tiles, 0, run_forward, variant),
                Case(
                    "_rms_norm_wide_backward_kernel", backward, rms_norm_wide_tiles, 0, run_backward, variant
                ),
                Case("_rms_norm_columns_kernel", columns, rms_norm_columns_tiles, 0, run_backward, variant),
            ]
        backward_table = _rms_norm_weighted_backward_tiles if full else _rms_norm_backward_tiles
        found = [Case("_rms_norm_forward_kernel", forward, _rms_norm_forward_tiles, N, run_forward, variant)]
        if not (full and N > WIDEST_WEIGHTED):
            found.append(
                Case("_rms_norm_backward_kernel", backward, backward_table, N, run_backward, variant)
            )
        return found

    widths = (512, 1024, 2048, 4096, 8192, 16384)
    return [case for N in widths for full in (False, True) for case in of(N, full)] + of(32768, True)

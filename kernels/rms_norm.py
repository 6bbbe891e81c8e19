"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich, 2019).

Rows are normalised in float32 and rounded once. With r = 1 / sqrt(mean(x^2) + eps), n = x r, g = dy weight:

    dx = r (g - n mean(g n))        dweight = sum over rows of dy n

With a residual, what is normalised is x + residual, or a x + b residual for scalars a and b. Let d be the
gradient of this sum, by its norm and by its other uses:

    dx = a d        dresidual = b d        da = sum(d x)        db = sum(d residual)

With scales, backward reads x and residual and adds them again, so that the sum need not be kept.

Bound by memory. Bytes for M rows of N elements of e bytes: forward 2 M N e, backward 3 M N e; with the
residual add 4 M N e each, and with scales 6 M N e backward. About 4 M N FLOPs forward and 8 M N backward.
Rows wider than a program's registers take two passes: rms_norm_wide.py.
"""
# M rows, N width of a row, a and b scales of x and residual

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotlap.kernels.cpu import rms_norm as cpu
from hotlap.kernels.dispatch import device_facts, kernel_op, promote, use_c, use_triton, wrap_triton
from hotlap.kernels.rms_norm_narrow import (
    WIDEST,
    WIDEST_SCALED,
    WIDEST_WEIGHTED,
    _rms_norm_backward_kernel,
    _rms_norm_backward_tiles,
    _rms_norm_forward_kernel,
    _rms_norm_forward_tiles,
    _rms_norm_scaled_backward_tiles,
    _rms_norm_weighted_backward_tiles,
)
from hotlap.kernels.rms_norm_wide import (
    _rms_norm_columns_kernel,
    _rms_norm_wide_backward_kernel,
    _rms_norm_wide_forward_kernel,
    rms_norm_columns_tiles,
    rms_norm_wide_tiles,
)
from hotlap.kernels.tiles import Case, as_rows, cdiv, next_power_of_2, pick_tile, type_name

EPS = 1e-6


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """The specification, with statistics in float32 or wider. x: (..., D), weight: (D,) or None; returns x's
    dtype.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def rms_norm_residual_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = EPS,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the sum is rounded to the dtype of x before it is normalised."""
    total = x + residual if scales is None else scales[0] * x + scales[1] * residual
    return rms_norm_ref(total, weight, eps), total


def _forward(
    x: Tensor, residual: Tensor | None, a: Tensor | None, b: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the sum (where there is a residual), and the reciprocal norms (M,)."""
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
    arguments = (weight, y, total, rstd, rows.stride(0), stride, M, N, eps)
    with torch.cuda.device_of(x):
        if block > WIDEST:
            tile = pick_tile(rms_norm_wide_tiles, 0, device)
            wrap_triton(_rms_norm_wide_forward_kernel)[(M,)](rows, added, *arguments, **tile.arguments)
        else:
            tile = pick_tile(_rms_norm_forward_tiles, block, device)
            grid = (cdiv(M, tile.blocks["ROWS"]),)
            wrap_triton(_rms_norm_forward_kernel)[grid](rows, added, a, b, *arguments, **tile.arguments)
    return y, total, rstd


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, residual, and of a and b in one float32 tensor (2,); empty for what is missing.

    What was normalised is x, or with the scales a x + b residual.
    """
    N, M = x.shape[-1], math.prod(x.shape[:-1])
    dx, dweight, dresidual, dscales = _fake_backward(dy, dtotal, x, residual, a, b, weight, rstd)
    if x.numel() == 0:
        return dx, dweight.zero_(), dresidual, dscales.zero_()
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
            if weight is not None:
                dweight = _columns(dy, x, rstd).to(weight.dtype)
            return dx, dweight, dresidual, dscales
        if weight is None and a is None:
            tile = pick_tile(_rms_norm_backward_tiles, block, device)
            programs = cdiv(M, tile.blocks["ROWS"])
        else:
            weighted, scaled = _rms_norm_weighted_backward_tiles, _rms_norm_scaled_backward_tiles
            tile = pick_tile(weighted if a is None else scaled, block, device)
            programs = min(cdiv(M, tile.blocks["ROWS"]), device.processors * tile.per_processor)
        of_weight = of_scales = None  # shares of the programs
        if weight is not None:
            of_weight = torch.empty((programs, N), dtype=torch.float32, device=x.device)
        stride = 0
        if a is not None:
            residual = as_rows(residual)
            stride = residual.stride(0)
            of_scales = torch.empty((2, programs), dtype=torch.float32, device=x.device)
        wrap_triton(_rms_norm_backward_kernel)[(programs,)](
            dy, added, x, residual, a, b, weight, rstd,
            dx, None if a is None else dresidual, of_weight, of_scales,
            *strides, stride, M, N, STAGES=tile.stages, **tile.arguments,
        )  # fmt: skip
        if weight is not None:
            dweight = of_weight.sum(0).to(weight.dtype)
        if a is not None:
            dscales = of_scales.sum(1)
    return dx, dweight, dresidual, dscales


def _columns(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the weight for rows too wide to accumulate it in registers: partial sums over groups of
    rows, for four programs per processor.
    """
    M, N = x.shape
    device = device_facts(x.device)
    tile = pick_tile(rms_norm_columns_tiles, 0, device)
    across = cdiv(N, tile.blocks["BLOCK"])
    down = min(cdiv(4 * device.processors, across), cdiv(M, tile.blocks["ROWS"]))
    shares = torch.empty((down, N), dtype=torch.float32, device=x.device)
    wrap_triton(_rms_norm_columns_kernel)[(across, down)](
        dy, x, rstd, shares, dy.stride(0), x.stride(0), M, N, **tile.arguments
    )
    return shares.sum(0)


def _forward_plain(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, None, None, weight, eps)
    return y, rstd


def _forward_residual(
    x: Tensor, residual: Tensor, a: Tensor | None, b: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, a, b, weight, eps)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_rstd(x: Tensor) -> Tensor:
    return torch.empty(math.prod(x.shape[:-1]), dtype=torch.float32, device=x.device)


def _fake_backward(dy, dtotal, x, residual, a, b, weight, rstd):
    dweight, dresidual = (x.new_empty(0) if given is None else _empty(given) for given in (weight, residual))
    return _empty(x), dweight, dresidual, x.new_empty(0 if a is None else 2, dtype=torch.float32)


def _save_plain(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient_plain(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight, *_ = _rms_norm_backward(dy, None, x, None, None, None, weight, rstd)
    return dx, None if weight is None else dweight, None


def _save_residual(ctx, inputs, output):
    x, residual, a, b, weight, _ = inputs
    _, total, rstd = output
    parts = (total, None, None, None) if a is None else (x, residual, a, b)
    ctx.save_for_backward(*parts, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradient_residual(ctx, dy, dtotal, _):
    x, residual, a, b, weight, rstd = ctx.saved_tensors
    if dy is None and a is None:
        return dtotal, dtotal, None, None, None, None
    dy = torch.zeros_like(dtotal) if dy is None else dy
    dx, dweight, dresidual, dscales = _rms_norm_backward(dy, dtotal, x, residual, a, b, weight, rstd)
    dweight = None if weight is None else dweight
    if a is None:
        return dx, dx, None, None, dweight, None
    da, db = dscales.to(a.dtype).unbind()
    return dx, dresidual, da, db, dweight, None


_rms_norm_backward = kernel_op("rms_norm_backward", _backward, _fake_backward, c=cpu.backward)
_rms_norm = kernel_op(
    "rms_norm",
    _forward_plain,
    lambda x, weight, eps: (_empty(x), _fake_rstd(x)),
    _save_plain,
    _gradient_plain,
    c=cpu.forward_plain,
)
_rms_norm_residual = kernel_op(
    "rms_norm_residual",
    _forward_residual,
    lambda x, residual, a, b, weight, eps: (_empty(x), _empty(x), _fake_rstd(x)),
    _save_residual,
    _gradient_residual,
    c=cpu.forward_residual,
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
    return _rms_norm(x, weight, eps)[0] if use_triton(x) or use_c(x) else rms_norm_ref(x, weight, eps)


def rms_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = EPS,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual add and the RMSNorm after it, in one pass: (normalised, new residual).

    x, residual: (..., D) of one dtype. The new residual, x + residual, is rounded to it before the norm.
    weight: (D,) or None. scales: a and b, tensors () of one dtype, for a new residual of a x + b residual,
    of which the kernel rounds the sum, and torch both products too. Under `torch.autocast`, x and residual
    may differ in dtype; the wider one counts.
    """
    x, residual = promote(x, residual)
    _check(x, weight, residual)
    if scales is not None and (any(scale.dim() for scale in scales) or scales[0].dtype != scales[1].dtype):
        given = " and ".join(f"{tuple(scale.shape)} {scale.dtype}" for scale in scales)
        raise ValueError(f"scales are {given}; both have to be () and of one dtype")
    if not (use_triton(x) or use_c(x)):
        return rms_norm_residual_ref(x, residual, weight, eps, scales)
    if scales is not None and use_triton(x) and next_power_of_2(x.shape[-1]) > WIDEST_SCALED:
        total = scales[0] * x + scales[1] * residual
        return rms_norm(total, weight, eps), total
    return _rms_norm_residual(x, residual, *(scales or (None, None)), weight, eps)[:2]


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: rows of 512 to 32768, plain, with weight and residual, and with
    scaled residual.
    """
    t = f"*{type_name(dtype)}"

    def of(N: int, weighted: bool = False, scaled: bool = False) -> list[Case]:
        added, weights, scales = (t if given else None for given in (weighted or scaled, weighted, scaled))
        sizes = dict.fromkeys(("stride_x", "stride_residual", "stride_dy", "stride_dtotal", "M", "N"), "i32")
        both = {"x": t, "weight": weights, "rstd": "*fp32", "a": scales, "b": scales} | sizes
        forward = both | {"residual": added, "y": t, "total": added, "eps": "fp64"}
        backward = both | {"dy": t, "dtotal": added, "residual": scales, "dx": t, "dresidual": scales}
        backward |= {"dweight": weights and "*fp32", "dscales": scales and "*fp32"}

        def inputs(device):
            """x, residual, a, b and weight."""
            x = torch.randn((1 << 26) // N, N, device=device, dtype=dtype)
            residual = torch.randn_like(x) if added else None
            a = b = x[0, 0].clone() if scaled else None
            return x, residual, a, b, torch.randn_like(x[0]) if weighted else None

        def run_forward(device):
            arguments = inputs(device)
            return lambda: _forward(*arguments, EPS)

        def run_backward(device):
            x, residual, a, b, weight = inputs(device)
            rstd = _forward(x, residual, a, b, weight, EPS)[2]
            parts = (residual, a, b) if scaled else (None, None, None)
            return lambda: _backward(x, residual, x, *parts, weight, rstd)

        variant = "scaled residual" if scaled else "weight, residual" if weighted else ""
        if N > WIDEST:
            columns = backward | {"dweight": "*fp32"}
            return [
                Case("_rms_norm_wide_forward_kernel", forward, rms_norm_wide_tiles, 0, run_forward, variant),
                Case(
                    "_rms_norm_wide_backward_kernel", backward, rms_norm_wide_tiles, 0, run_backward, variant
                ),
                Case("_rms_norm_columns_kernel", columns, rms_norm_columns_tiles, 0, run_backward, variant),
            ]
        backward_table = _rms_norm_weighted_backward_tiles if weighted else _rms_norm_backward_tiles
        if scaled:
            backward_table = _rms_norm_scaled_backward_tiles
        found = [Case("_rms_norm_forward_kernel", forward, _rms_norm_forward_tiles, N, run_forward, variant)]
        if not (weighted and N > WIDEST_WEIGHTED):
            found.append(
                Case("_rms_norm_backward_kernel", backward, backward_table, N, run_backward, variant)
            )
        return found

    widths = (512, 1024, 2048, 4096, 8192, 16384)
    found = [case for N in widths for weighted in (False, True) for case in of(N, weighted)]
    found += [case for N in widths if N <= WIDEST_SCALED for case in of(N, scaled=True)]
    return found + of(32768, weighted=True)

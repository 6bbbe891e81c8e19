"""Products of a few rows with a large weight, as in decoding, fused with what surrounds them in a block.

    norm_linear:      total = a x + b x0,  n = rms_norm(total),  y = n W^T or relu(n W^T)^2,  n_{:G} V^T
    linear_residual:  y = x W^T + residual
    linear:           y = x W^T

W may be in int8 with a scale for each row, as `int8.py` makes it. It becomes the dtype of x, which is exact,
before the product, and the scale a factor of the sum.

Bound by memory: N D e bytes of W, for elements of e bytes. The Triton kernel is in decode_linear_kernels.py.
The norm scales the product of each row, so the normalised row is not rounded to the dtype of x before it, as
the reference does, which changes y by at most 2^-8 |n| |W|^T in bfloat16, 2^-11 in float16.

On a CPU, a kernel in C takes the same, in float32 and bfloat16. It adds in one order for any number of rows,
so what a row gives does not depend, to the last bit, on the rows beside it. With instructions for matrices,
torch may be faster from a few rows on: `fusing_pays` measures that.

For inference: where a gradient may be needed, for more than ROWS rows, for weights of another dtype than x's
or `torch.autocast`'s, and for float32 on a GPU (no tensor cores), the functions are the reference, to which
int8 comes as the weight that it stands for.
"""
# R rows (tokens), D inner dimension, N outputs, K gates of V, which read G channels

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.batch_invariant import invariant
from hotlap.kernels.cpu import decode_linear as cpu
from hotlap.kernels.decode_linear_kernels import (
    ROWS,
    _decode_linear_early_kernel,
    _decode_linear_kernel,
    _decode_linear_narrow_tiles,
    _decode_linear_wide_tiles,
)
from hotlap.kernels.dispatch import (
    INTERPRETED,
    Device,
    autocast_dtype,
    constant,
    device_facts,
    kernel_op,
    launches,
    promote,
    use_c,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.int8 import dequantized, quantize_rows
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import EPS, rms_norm_ref, rms_norm_residual_ref
from hotlap.kernels.tiles import Case, Table, Tile, cdiv, fitting_tiles, next_power_of_2, pick_tile, type_name

Mix = tuple[Tensor, Tensor, Tensor]  # a, b (one element each) and x0 (as x)


def norm_linear_ref(
    x: Tensor,
    weight: Tensor,
    mix: Mix | None = None,
    gate: Tensor | None = None,
    squared_relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification: each step is rounded to the dtype of x."""
    if mix is None:
        normalised = rms_norm_ref(x)
    else:
        a, b, x0 = mix
        normalised, x = rms_norm_residual_ref(x, x0, scales=(a.to(x.dtype), b.to(x.dtype)))
    y = F.linear(normalised, weight.to(x.dtype))
    gates = None if gate is None else F.linear(normalised[..., : gate.shape[1]], gate.to(x.dtype))
    return (relu2(y) if squared_relu else y), x, gates


def linear_residual_ref(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The specification."""
    return residual + F.linear(x, weight.to(x.dtype))


def _table(N: int, device: Device) -> Table:
    programs = N // 16
    return _decode_linear_narrow_tiles if programs < 2 * device.processors else _decode_linear_wide_tiles


def _tile(N: int, R: int, device: Device) -> Tile:
    """Of a kernel that can be launched now: tracers do not know launch_pdl."""
    table, rows = _table(N, device), 1 if R == 1 else ROWS
    tile = pick_tile(table, rows, device)
    if tile.kernel and not launches():
        tile = next(plain for plain in fitting_tiles(table, rows, device) if not plain.kernel)
    return tile


def _product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x0: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    norm: bool,
    squared_relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), a x + b x0 and the gates (..., K); what is not asked for is empty."""
    y, total, gates = _empty(x, weight, scales, a, b, x0, gate)
    if y.numel() == 0:
        return y, total, gates
    N, D = weight.shape
    K, G = (0, 0) if gate is None else gate.shape
    R = math.prod(x.shape[:-1])
    x, x0, gate, residual = (t if t is None else t.contiguous() for t in (x, x0, gate, residual))  # small
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = _tile(N, R, device_facts(x.device))
    kernel = _decode_linear_early_kernel if tile.kernel else _decode_linear_kernel
    early = {"launch_pdl": True} if tile.kernel else {}
    programs = cdiv(N, tile.blocks["BLOCK_N"]) + int(x0 is not None or gate is not None)
    with torch.cuda.device_of(x):
        wrap_triton(kernel)[(programs,)](
            x, a, b, x0, weight, scales, gate, residual, y, None if x0 is None else total,
            None if gate is None else gates, weight.stride(0), R, N, D, K, G, EPS, NORM=norm,
            RELU2=squared_relu, BLOCK_K=next_power_of_2(K), BLOCK_G=next_power_of_2(G), **tile.arguments,
            **early,
        )  # fmt: skip
    return y, total, gates


def _empty(x: Tensor, weight: Tensor, scales, a, b, x0, gate, *_) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    shapes = (*rows, weight.shape[0]), x.shape if x0 is not None else (0,)
    gates = (0,) if gate is None else (*rows, gate.shape[0])
    return tuple(torch.empty(shape, dtype=x.dtype, device=x.device) for shape in (*shapes, gates))


_decode_linear = kernel_op("decode_linear", _product, _empty, c=cpu.forward)


def fuses(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the product of x (..., D) and weight (N, D), with what is fused with it, runs the kernel."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, *others))
    few = math.prod(x.shape[:-1]) <= ROWS and x.dtype == (autocast_dtype(x) or x.dtype)
    few = few and weight.dtype in (x.dtype, torch.int8)
    if learns or not few:
        return False
    return use_c(x) or (use_triton(x) and (x.dtype != torch.float32 or INTERPRETED))


@constant
def most_rows(x_dtype: torch.dtype, width: int) -> int:
    """As `cpu.most_rows`."""
    return cpu.most_rows(x_dtype, width)


def fusing_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a block whose first product is of x (..., D) and weight is faster with the products of this
    file. On a CPU that is measured; they are the faster ones for int8, which the others have to convert.
    """
    if invariant(x) or not fuses(x, weight):  # what is fused rounds otherwise
        return False
    on_cpu = use_c(x) and weight.dtype != torch.int8
    return not on_cpu or math.prod(x.shape[:-1]) <= most_rows(x.dtype, x.shape[-1])


def norm_linear(
    x: Tensor,
    weight: Tensor,
    mix: Mix | None = None,
    gate: Tensor | None = None,
    squared_relu: bool = False,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, total, gates): y = n weight^T, or its relu(.)^2, of n = rms_norm(total), where total = a x + b x0,
    or x without a mix; and gates = n_{:G} gate^T, or None without a gate.

    x, x0: (..., D); weight: (N, D), in the dtype of x, or in int8 with scales (N,) in float32; a, b: one
    element each, rounded to the dtype of x; gate: (K, G). Returns (..., N), (..., D) and (..., K) in that
    dtype. Under `torch.autocast`, y and gates have its dtype, and total the wider one of x and x0.
    """
    _check(x, weight, scales)
    if mix is not None:
        x, x0 = promote(x, mix[2])
        mix = (*mix[:2], x0)
    if mix is not None and (mix[2].shape != x.shape or mix[2].dtype != x.dtype):
        given = f"x0 is {tuple(mix[2].shape)} {mix[2].dtype}"
        raise ValueError(f"{given}; it has to be as x, {tuple(x.shape)} {x.dtype}")
    if gate is not None and (gate.dim() != 2 or gate.shape[1] > x.shape[-1]):
        raise ValueError(f"gate is {tuple(gate.shape)}; needed are (K, G), with G up to {x.shape[-1]}")
    others = (*(mix or ()), *(() if gate is None else (gate,)))
    if not fuses(x, weight, *others):
        return norm_linear_ref(x, _whole(x, weight, scales), mix, gate, squared_relu)
    a, b, x0 = mix or (None, None, None)
    y, total, gates = _decode_linear(x, weight, scales, a, b, x0, gate, None, True, squared_relu)
    return y, x if mix is None else total, None if gate is None else gates


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """x weight^T of x (..., D) and weight (N, D), as in `norm_linear`, in the dtype of x."""
    _check(x, weight, scales)
    if not fuses(x, weight):
        return F.linear(x, _whole(x, weight, scales).to(x.dtype))
    return _decode_linear(x, weight, scales, None, None, None, None, None, False, False)[0]


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor, scales: Tensor | None = None) -> Tensor:
    """residual + x weight^T of x (..., D), weight (N, D), as in `norm_linear`, and residual (..., N), in the
    dtype of x. Under `torch.autocast`, which has its dtype for the product, in the wider one of that and of
    the residual.
    """
    _check(x, weight, scales)
    shape, mixed = (*x.shape[:-1], weight.shape[0]), autocast_dtype(x) is not None
    if residual.shape != shape or (residual.dtype != x.dtype and not mixed):
        given = f"residual is {tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"{given}; it has to be as the product, {shape} {x.dtype}")
    if residual.dtype != x.dtype or not fuses(x, weight, residual):
        return linear_residual_ref(x, _whole(x, weight, scales), residual)
    return _decode_linear(x, weight, scales, None, None, None, None, residual, False, False)[0]


def _whole(x: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    """A weight that torch can multiply."""
    return weight if scales is None else dequantized(weight, scales, x.dtype)


def _check(x: Tensor, weight: Tensor, scales: Tensor | None) -> None:
    if (weight.dtype == torch.int8) != (scales is not None):
        given = f"weight is {weight.dtype} with{'out' * (scales is None)} scales"
        raise ValueError(f"{given}; int8 needs them, and nothing else has them")
    if scales is not None and (scales.shape != weight.shape[:1] or scales.dtype != torch.float32):
        raise ValueError(f"scales are {tuple(scales.shape)} {scales.dtype}; a weight (N, D) has N in float32")
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
    optional = ("a", "b", "x0", "scales", "gate", "residual", "total", "gates")
    t, absent = f"*{type_name(dtype)}", dict.fromkeys(optional)
    common = {"x": t, "w": t, "y": t, "eps": "fp64", "BLOCK_K": 0, "BLOCK_G": 0, **absent}
    common |= dict.fromkeys(("w_n", "N", "D", "K", "G"), "i32")
    fused = {**dict.fromkeys(("x0", "total", "a", "b", "gate", "gates"), t), "BLOCK_K": 16, "BLOCK_G": 16}
    forms = {
        "norm, relu2": (6144, 1536, {"NORM": True, "RELU2": True}),
        "residual": (1536, 6144, {"NORM": False, "RELU2": False, "residual": t}),
        "int8, norm, relu2": (6144, 1536, {"NORM": True, "RELU2": True, "w": "*i8", "scales": "*fp32"}),
        "mix, norm, gate": (4608, 1536, {"NORM": True, "RELU2": False, **fused}),
    }

    def run(rows: int, N: int, D: int, form: dict, device: torch.device):
        weights = torch.randn(12, N, D, device=device, dtype=dtype) / D**0.5  # 12: more than caches hold
        x, residual = (torch.randn(rows, width, device=device, dtype=dtype) for width in (D, N))
        mix = (x[0, 0], x[0, 1], x) if "x0" in form else (None, None, None)
        gate = weights[0, :12, :12] if "gate" in form else None
        added = residual if "residual" in form else None
        given = [quantize_rows(w) if "scales" in form else (w, None) for w in weights]

        def launch():
            for weight, scales in given:
                _decode_linear(x, weight, scales, *mix, gate, added, form["NORM"], form["RELU2"])

        return launch

    found = []
    for variant, (N, D, form) in forms.items():
        table = _decode_linear_narrow_tiles if N == 1536 else _decode_linear_wide_tiles
        for rows in (1, ROWS):
            arguments = common | form | {"R": 1 if rows == 1 else "i32"}
            start = functools.partial(run, rows, N, D, form)
            found.append(Case("_decode_linear_kernel", arguments, table, rows, start, variant, small=True))
    return found

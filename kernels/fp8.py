"""Linear layers with fp8 matmuls: e4m3 forward, e5m2 for gradients.

Each tensor has one scale, 448 / max |x| (57344 for e5m2), computed each time (tensorwise dynamic scaling;
Micikevicius et al., "FP8 formats for deep learning", 2022). An fp8 matmul needs its first operand row-major
and its second column-major, so forward and backward together need every tensor in both layouts. Three kernels
make them: the first writes the largest value that each program saw; the second reads the tensor again,
starting at the end, which is still in the cache, and writes it in fp8; the third transposes that. In an MLP
they also apply ReLU^2 and its gradient, which are then never written in 16 bits.

Backward keeps the transposes of x and W, one byte per element. Two passes over each tensor of e bytes per
element move 2 M N e + 3 M N bytes, for 2 M N K FLOPs at twice bf16's rate: only large layers gain.
"""
# M tokens, K inputs, N outputs

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.dispatch import (
    Device,
    autocast,
    device_facts,
    jit,
    kernel_op,
    no_autocast,
    tl,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.relu2 import relu2_ref
from hotlap.kernels.tiles import Case, Tile, as_rows, cdiv, next_power_of_2, pick_tile, type_name

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Lower bound of N K / (N + K): matmuls save in proportion to N K, the extra passes cost as N + K.
# nanochat found its d12 slower in fp8 (its largest layer has 614) and its d26 faster (its smallest has 832).
SMALLEST = 700
NOTHING = 1e-30  # if the largest value is below, all become zero; keeps the scale finite


def check_fp8(device: torch.device) -> None:
    """ValueError if the device has no fp8 matmuls."""
    need = "fp8 needs an NVIDIA GPU of compute capability 8.9 or later"
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"{need}, and not {device}; use bfloat16")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        has = ".".join(map(str, capability))
        raise ValueError(f"{need}, and {torch.cuda.get_device_name(device)} has {has}; use bfloat16")


def fp8_pays(outputs: int, inputs: int) -> bool:
    """Whether a layer is large enough to gain from fp8, and has a size that fp8 matmuls take."""
    large = outputs * inputs >= SMALLEST * (outputs + inputs)
    return large and outputs % 16 == 0 and inputs % 16 == 0


def quantize_ref(
    x: Tensor, dtype: torch.dtype, relu2: bool = False, pre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `quantize`."""
    x = x.float()
    if relu2:
        x = relu2_ref(x)
    elif pre is not None:
        x = x * (2 * pre.float().relu())
    largest, limit = torch.linalg.vector_norm(x, float("inf")), torch.finfo(dtype).max
    some, most = largest > NOTHING, torch.full_like(largest, limit)  # GPUs divide by numbers less exactly
    y = x * torch.where(some, most / largest, 1.0)
    y = y.clamp(-limit, limit).to(dtype).contiguous()  # casts beyond the limit are undefined
    return y, y.T.contiguous(), torch.where(some, largest / most, 1.0)


@jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M, 1) and columns (1, BLOCK_N) of a tile, and which of its elements exist."""
    across = tl.cdiv(N, BLOCK_N)
    m = (tile // across * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    n = (tile % across * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
    return m, n, (m < M) & (n < N)


@jit
def _values(x, pre, stride, pre_stride, m, n, mask, RELU2: tl.constexpr):
    """The values to quantise, in float32. NaN stays NaN."""
    # separate from _place: torch assumes that everything a function returns points where its arguments do
    v = tl.load(x + m * stride + n, mask, other=0.0).to(tl.float32)
    if RELU2:
        v = tl.where(v < 0, 0.0, v)
        v *= v
    elif pre is not None:
        p = tl.load(pre + m * pre_stride + n, mask, other=0.0).to(tl.float32)
        v *= 2.0 * tl.where(p < 0, 0.0, p)
    return v


@jit
def _largest_kernel(
    x, pre, largest, stride, pre_stride, M, N,
    RELU2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest absolute value that each program saw. NaN is ignored: it stays in x."""
    most = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n, mask = _place(tile, M, N, BLOCK_M, BLOCK_N)
        most = tl.maximum(most, tl.abs(_values(x, pre, stride, pre_stride, m, n, mask, RELU2)))
    tl.store(largest + tl.program_id(0), tl.max(tl.max(most, 1), 0))


@jit
def _quantize_kernel(
    x, pre, largest, y, inverse, stride, pre_stride, M, N, parts, limit, nothing,
    RELU2: tl.constexpr, E5M2: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y: the bits of fp8, as int8."""
    limit, nothing = tl.cast(limit, tl.float32), tl.cast(nothing, tl.float32)
    part = tl.arange(0, PARTS)
    most = tl.max(tl.load(largest + part, part < parts, other=0.0), 0)
    some = most > nothing
    scale = tl.where(some, tl.div_rn(limit, most), 1.0)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.where(some, tl.div_rn(most, limit), 1.0))
    m, n, mask = _place(tl.num_programs(0) - 1 - tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    v = _values(x, pre, stride, pre_stride, m, n, mask, RELU2) * scale
    v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))  # unlike a minimum, keeps NaN
    v = v.to(tl.float8e5 if E5M2 else tl.float8e4nv).to(tl.int8, bitcast=True)
    tl.store(y + m * N + n, v, mask)


@jit
def _transpose_kernel(y, transposed, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """transposed (N, M) of y (M, N), both int8. Not part of the kernel before, because ptxas 12.9, which
    Triton 3.6 to 3.8 use on Hopper, transposes fp8 wrongly in the kernel that made it
    (triton-lang/triton#11111).
    """
    m, n, mask = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    v = tl.load(y + m * N + n, mask, other=0)
    tl.store(transposed + tl.trans(n * M + m), tl.trans(v), tl.trans(mask))


def _largest_tiles(_: int, __: Device) -> list[Tile]:
    sizes = ((32, 128, 8, 4), (64, 128, 8, 2), (32, 256, 8, 2), (32, 128, 4, 6))
    return [Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, per_processor=count) for m, n, warps, count in sizes]


def _quantize_tiles(_: int, __: Device) -> list[Tile]:
    sizes = ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8))
    return [Tile({"BLOCK_M": m, "BLOCK_N": n}, warps) for m, n, warps in sizes]


def _transpose_tiles(_: int, __: Device) -> list[Tile]:
    sizes = ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8))
    return [Tile({"BLOCK_M": m, "BLOCK_N": n}, warps) for m, n, warps in sizes]


def _tiles_of(M: int, N: int, tile: Tile) -> int:
    return cdiv(M, tile.blocks["BLOCK_M"]) * cdiv(N, tile.blocks["BLOCK_N"])


def _largest(x: Tensor, relu2: bool, pre: Tensor | None) -> Tensor:
    """Largest absolute values of parts of the tensor: (parts,) in float32."""
    (M, N), facts = x.shape, device_facts(x.device)
    tile = pick_tile(_largest_tiles, 0, facts)
    parts = min(_tiles_of(M, N, tile), tile.per_processor * facts.processors)
    largest = torch.empty(parts, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        wrap_triton(_largest_kernel)[(parts,)](
            x, pre, largest, x.stride(0), _stride(pre), M, N, RELU2=relu2, **tile.arguments
        )
    return largest


def _stride(pre: Tensor | None) -> int:
    return 0 if pre is None else pre.stride(0)


def _quantize(
    x: Tensor, dtype: torch.dtype, relu2: bool, pre: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape
    y, transposed = (torch.empty(shape, dtype=torch.int8, device=x.device) for shape in ((M, N), (N, M)))
    inverse = torch.empty((), dtype=torch.float32, device=x.device)
    if M * N == 0:
        return y.view(dtype), transposed.view(dtype), inverse.fill_(1.0)
    x, pre = as_rows(x), None if pre is None else as_rows(pre)
    largest = _largest(x, relu2, pre)
    tile, parts = pick_tile(_quantize_tiles, 0, device_facts(x.device)), len(largest)
    with torch.cuda.device_of(x):
        wrap_triton(_quantize_kernel)[(_tiles_of(M, N, tile),)](
            x, pre, largest, y, inverse, x.stride(0), _stride(pre), M, N, parts,
            torch.finfo(dtype).max, NOTHING,
            RELU2=relu2, E5M2=dtype == E5M2, PARTS=next_power_of_2(parts), **tile.arguments,
        )  # fmt: skip
        tile = pick_tile(_transpose_tiles, 0, device_facts(x.device))
        wrap_triton(_transpose_kernel)[(_tiles_of(M, N, tile),)](y, transposed, M, N, **tile.arguments)
    return y.view(dtype), transposed.view(dtype), inverse


def _fake_quantize(x: Tensor, dtype: torch.dtype, *_) -> tuple[Tensor, Tensor, Tensor]:
    y, transposed = (torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape[::-1]))
    return y, transposed, torch.empty((), dtype=torch.float32, device=x.device)


_quantize_op = kernel_op("quantize_fp8", _quantize, _fake_quantize)


def quantize(
    x: Tensor, dtype: torch.dtype, relu2: bool = False, pre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) scaled to fp8's range, its transpose (N, M), and the factor that undoes the scale, 0-d
    float32.

    relu2: quantise relu(x)^2 instead. pre (M, N): quantise its gradient 2 relu(pre) x instead. NaN stays NaN,
    and infinity becomes NaN.
    """
    return (_quantize_op if use_triton(x) else quantize_ref)(x, dtype, relu2, pre)


Quantized = tuple[Tensor, Tensor]  # fp8, and the factor that undoes its scale


def scaled_product(a: Quantized, b: Quantized, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a b^T of a (M, K) and b (N, K), both row-major. fast: accumulate in fewer bits than float32."""
    (a, a_inverse), (b, b_inverse) = a, b
    with no_autocast(a):
        return torch._scaled_mm(
            a, b.T, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast and a.is_cuda
        )


# for a tensor z: zq and its transpose zt in fp8, and the factor zi that undoes their scale


class LinearFP8(torch.autograd.Function):
    """x W^T; compilers see the quantising operations and torch's matmuls."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        xq, xt, xi = quantize(x, E4M3)
        wq, wt, wi = quantize(weight, E4M3)
        ctx.save_for_backward(xt, xi, wt, wi)
        ctx.weight_dtype = weight.dtype
        return scaled_product((xq, xi), (wq, wi), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy: Tensor):
        xt, xi, wt, wi = ctx.saved_tensors
        dq, dt, di = quantize(dy, E5M2)
        dx = scaled_product((dq, di), (wt, wi), dy.dtype)
        if not ctx.needs_input_grad[1]:  # frozen, beside an adapter
            return dx, None
        return dx, scaled_product((dt, di), (xt, xi), ctx.weight_dtype)


class LinearReLU2FP8(torch.autograd.Function):
    """relu(x W_in^T)^2 W_out^T in the same way. It saves p = x W_in^T, and relu(p)^2 in fp8."""

    @staticmethod
    def forward(ctx, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        xq, xt, xi = quantize(x, E4M3)
        vq, vt, vi = quantize(w_in, E4M3)
        p = scaled_product((xq, xi), (vq, vi), x.dtype, fast=True)
        aq, at, ai = quantize(p, E4M3, relu2=True)
        wq, wt, wi = quantize(w_out, E4M3)
        ctx.save_for_backward(xt, xi, vt, vi, p, at, ai, wt, wi)
        ctx.weight_dtype = w_in.dtype
        return scaled_product((aq, ai), (wq, wi), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy: Tensor):
        xt, xi, vt, vi, p, at, ai, wt, wi = ctx.saved_tensors
        yq, yt, yi = quantize(dy, E5M2)
        dw_out = scaled_product((yt, yi), (at, ai), ctx.weight_dtype)
        da = scaled_product((yq, yi), (wt, wi), dy.dtype)
        pq, pt, pi = quantize(da, E5M2, pre=p)
        dx = scaled_product((pq, pi), (vt, vi), dy.dtype)
        return dx, scaled_product((pt, pi), (xt, xi), ctx.weight_dtype), dw_out


def linear_fp8_ref(x: Tensor, weight: Tensor) -> Tensor:
    """What `linear_fp8` approximates."""
    return F.linear(x, weight.to(x.dtype))


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T with fp8 matmuls. x: (..., K) in bfloat16 or float16, weight: (N, K); (..., N) like x.

    All sizes, and the number of rows of x, have to be multiples of 16. `torch.autocast` casts x.
    """
    (x,) = autocast(x)
    M, (N, K) = math.prod(x.shape[:-1]), weight.shape
    if x.shape[-1] != K or M % 16 or N % 16 or K % 16:
        shapes = f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; fp8 needs (..., K) and (N, K), all of them multiples of 16")
    return LinearFP8.apply(x.reshape(M, K), weight).view(*x.shape[:-1], N)


def linear_relu2_fp8(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """`linear_relu2` with fp8 matmuls. x: (..., D) in bfloat16 or float16, w_in: (N, D), w_out: (D, N).

    All sizes, and the number of rows of x, have to be multiples of 16. `torch.autocast` casts x.
    """
    (x,) = autocast(x)
    M, (N, D) = math.prod(x.shape[:-1]), w_in.shape
    if x.shape[-1] != D or w_out.shape != (D, N) or M % 16 or N % 16 or D % 16:
        shapes = f"x is {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)}"
        raise ValueError(f"{shapes}; fp8 needs (..., D), (N, D) and (D, N), all of them multiples of 16")
    return LinearReLU2FP8.apply(x.reshape(M, D), w_in, w_out).view(*x.shape[:-1], D)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: 16k tokens of width 1536, and of an MLP's hidden layer."""
    t, without = f"*{type_name(dtype)}", ("sm_80", "gfx942")  # which have no fp8
    sizes = dict.fromkeys(("stride", "M", "N"), "i32")
    found = []
    for name, fp8, width in (("e4m3", E4M3, 1536), ("e5m2", E5M2, 1536), ("relu2", E4M3, 6144),
                             ("gradient", E5M2, 6144)):  # fmt: skip
        relu2, gradient = name == "relu2", name == "gradient"

        def run(launch: Callable, device: torch.device, relu2=relu2, gradient=gradient, width=width):
            x = torch.randn(16384, width, device=device, dtype=dtype)
            pre = x.clone() if gradient else None
            return lambda: launch(x, relu2, pre)

        common = {"x": t, "pre": t if gradient else None, "largest": "*fp32", "RELU2": relu2, **sizes}
        common["pre_stride"] = "i32" if gradient else 0
        outputs = {"y": "*i8", "E5M2": fp8 is E5M2}
        outputs |= {"inverse": "*fp32", "parts": "i32", "PARTS": 1024, "limit": "fp64", "nothing": "fp64"}
        whole = functools.partial(run, lambda x, *given, fp8=fp8: _quantize(x, fp8, *given))
        found += [
            Case(
                "_largest_kernel", common, _largest_tiles, 0, functools.partial(run, _largest), name, without
            ),
            Case("_quantize_kernel", common | outputs, _quantize_tiles, 0, whole, name, without),
        ]
    bits = {"y": "*i8", "transposed": "*i8", "M": "i32", "N": "i32"}
    return [*found, Case("_transpose_kernel", bits, _transpose_tiles, 0, whole, "", without)]

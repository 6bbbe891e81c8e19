"""A linear layer whose three products run in fp8: e4m3 forward, e5m2 for the gradient of the output.

Each tensor has one scale, 448 / max |x| (57344 for e5m2), computed anew each time (tensorwise dynamic
scaling; Micikevicius et al., "FP8 formats for deep learning", 2022). A product wants its first operand by
rows and its second by columns, so that over forward and backward every tensor is needed both ways: one kernel
reads it once and writes it and its transpose in fp8, after one pass for the maximum.

Backward keeps the transposes of x and W, one byte an element. Two passes over each tensor, 2 M N e + 2 M N
bytes, against 2 M N K FLOPs at twice bf16's rate: worth it for large layers alone.
"""
# M tokens, K inputs, N outputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import wrap_triton

from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, triton, use_triton
from hotlap.kernels.tiles import Case, Tile, as_rows, pick_tile, type_name

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Layers with fewer weights are slower in fp8: nanochat found its d12 (768 x 3072) slower and its d26 faster.
SMALLEST = 1536 * 1536


def check_fp8(device: torch.device) -> None:
    """ValueError where products in fp8 have no hardware."""
    need = "fp8 needs an NVIDIA GPU of compute capability 8.9 or later"
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"{need}, and not {device}; use bfloat16")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        has = ".".join(map(str, capability))
        raise ValueError(f"{need}, and {torch.cuda.get_device_name(device)} has {has}; use bfloat16")


def fp8_pays(outputs: int, inputs: int) -> bool:
    """Whether a layer is large enough to be faster in fp8, and of a size that its products take."""
    return outputs * inputs >= SMALLEST and outputs % 16 == 0 and inputs % 16 == 0


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What x is multiplied by before it is cast, 0-d float32 on its device; 1 for zeros."""
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    return torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)


def quantize_ref(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The specification: x (M, N) times scale, bounded and rounded to dtype, and its transpose (N, M)."""
    limit = torch.finfo(dtype).max
    y = (x.float() * scale).clamp(-limit, limit).to(dtype)  # casts beyond the limit are not defined
    return y, y.T.contiguous()


@jit
def _quantize_kernel(
    x, scale, y, transposed, stride, M, N, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    across = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // across * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    n = (tl.program_id(0) % across * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
    mask, limit = (m < M) & (n < N), tl.cast(limit, tl.float32)
    value = tl.load(x + m * stride + n, mask, other=0.0).to(tl.float32) * tl.load(scale)
    value = tl.minimum(tl.maximum(value, -limit), limit).to(y.dtype.element_ty)  # (BLOCK_M, BLOCK_N)
    tl.store(y + m * N + n, value, mask)
    tl.store(transposed + tl.trans(n * M + m), tl.trans(value), tl.trans(mask))


def _quantize_tiles(_: int, __: Device) -> list[Tile]:
    sizes = ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8))
    return [Tile({"BLOCK_M": m, "BLOCK_N": n}, warps) for m, n, warps in sizes]


def _quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    M, N = x.shape
    y, transposed = _fake_quantize(x, scale, dtype)
    if M * N:
        x = as_rows(x)
        tile = pick_tile(_quantize_tiles, 0, device_facts(x.device))
        grid = (triton.cdiv(M, tile.blocks["BLOCK_M"]) * triton.cdiv(N, tile.blocks["BLOCK_N"]),)
        with torch.cuda.device_of(x):
            wrap_triton(_quantize_kernel)[grid](
                x, scale, y, transposed, x.stride(0), M, N, torch.finfo(dtype).max, **tile.arguments
            )
    return y, transposed


def _fake_quantize(x, scale, dtype):
    return tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape[::-1]))


_quantize_op = kernel_op("quantize_fp8", _quantize, _fake_quantize)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) in fp8, its transpose (N, M), and the scale that both were multiplied by, 0-d float32."""
    scale = scale_of(x, dtype)
    y, transposed = (_quantize_op if use_triton(x) else quantize_ref)(x, scale, dtype)
    return y, transposed, scale


def scaled_product(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T / scale of fp8 a (M, K) and b (N, K), both by rows. fast: sums in fewer bits than float32."""
    one = torch.ones((), dtype=torch.float32, device=a.device)
    return torch._scaled_mm(
        a, b.T, scale_a=1 / scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast and a.is_cuda
    )


class LinearFP8(torch.autograd.Function):
    """x W^T; what a compiler sees are the quantising operations and torch's products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        xq, xt, x_scale = quantize(x, E4M3)
        wq, wt, w_scale = quantize(weight, E4M3)
        ctx.save_for_backward(xt, wt, x_scale, w_scale)
        ctx.weight_dtype = weight.dtype
        return scaled_product(xq, wq, x_scale * w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy: Tensor):
        xt, wt, x_scale, w_scale = ctx.saved_tensors
        dq, dt, d_scale = quantize(dy, E5M2)
        dx = scaled_product(dq, wt, d_scale * w_scale, dy.dtype, fast=False)
        dw = scaled_product(dt, xt, d_scale * x_scale, dy.dtype, fast=False)
        return dx, dw.to(ctx.weight_dtype)


def linear_fp8_ref(x: Tensor, weight: Tensor) -> Tensor:
    """What `linear_fp8` approximates."""
    return F.linear(x, weight.to(x.dtype))


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T with products in fp8. x: (..., K) in bfloat16 or float16, weight: (N, K); (..., N) like x.

    All sizes, and the number of rows of x, have to be multiples of 16.
    """
    M, (N, K) = x.shape[:-1].numel(), weight.shape
    if x.shape[-1] != K or M % 16 or N % 16 or K % 16:
        shapes = f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; fp8 needs (..., K) and (N, K), all of them multiples of 16")
    return LinearFP8.apply(x.reshape(M, K), weight).view(*x.shape[:-1], N)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: 16k tokens of width 1536."""
    t = f"*{type_name(dtype)}"
    common = {"x": t, "scale": "*fp32", "stride": "i32", "M": "i32", "N": "i32", "limit": "fp64"}

    def run(device: torch.device):
        x = torch.randn(16384, 1536, device=device, dtype=dtype)
        scale = scale_of(x, E4M3)
        return lambda: _quantize(x, scale, E4M3)

    found = []
    for name, fp8 in (("e4m3", "*fp8e4nv"), ("e5m2", "*fp8e5")):
        arguments, without = common | {"y": fp8, "transposed": fp8}, ("sm_80", "gfx942")
        found.append(Case("_quantize_kernel", arguments, _quantize_tiles, 0, run, name, without))
    return found

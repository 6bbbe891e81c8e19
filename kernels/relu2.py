"""ReLU^2: max(x, 0)^2, elementwise (Primer, So et al., 2021). Its gradient is 2 max(x, 0) dy.

Computed in float32 and rounded once. Bound by memory: 2 e bytes an element of e bytes forward and 3 e
backward; two FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, use_triton, wrap_triton
from hotlap.kernels.tiles import Case, Tile, cdiv, pick_tile, type_name


def relu2_ref(x: Tensor) -> Tensor:
    """The specification. x: any shape; returns x's dtype."""
    return x.relu().square()


@jit
def _relu2_forward_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < n, other=0.0).to(tl.float32)
    v = tl.where(v < 0, 0.0, v)  # unlike a maximum, keeps NaN
    tl.store(y + i, (v * v).to(y.dtype.element_ty), i < n)


@jit
def _relu2_backward_kernel(dy, x, dx, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < n, other=0.0).to(tl.float32)
    d = 2.0 * tl.where(v < 0, 0.0, v) * tl.load(dy + i, i < n, other=0.0).to(tl.float32)
    tl.store(dx + i, d.to(dx.dtype.element_ty), i < n)


def _relu2_tiles(_: int, __: Device) -> list[Tile]:
    return [Tile({"BLOCK": block}, warps) for block, warps in ((2048, 4), (1024, 2), (4096, 8), (4096, 4))]


def _forward(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = x.numel()
    if n:
        x = x.contiguous()
        tile = pick_tile(_relu2_tiles, 0, device_facts(x.device))
        with torch.cuda.device_of(x):
            grid = (cdiv(n, tile.blocks["BLOCK"]),)
            wrap_triton(_relu2_forward_kernel)[grid](x, y, n, **tile.arguments)
    return y


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = x.numel()
    if n:
        x, dy = x.contiguous(), dy.contiguous()
        tile = pick_tile(_relu2_tiles, 0, device_facts(x.device))
        with torch.cuda.device_of(x):
            grid = (cdiv(n, tile.blocks["BLOCK"]),)
            wrap_triton(_relu2_backward_kernel)[grid](dy, x, dx, n, **tile.arguments)
    return dx


_relu2_backward = kernel_op(
    "relu2_backward", _backward, lambda dy, x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
)
_relu2 = kernel_op(
    "relu2",
    _forward,
    lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    save=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    backward=lambda ctx, dy: _relu2_backward(dy, ctx.saved_tensors[0]),
)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise. Same shape and dtype as x."""
    return _relu2(x) if use_triton(x) else relu2_ref(x).to(x.dtype)  # `torch.autocast` squares in float32


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner."""
    t, n = f"*{type_name(dtype)}", 1 << 26

    def data(device):
        return torch.randn(n, device=device, dtype=dtype)

    def forward(device):
        x = data(device)
        return lambda: _forward(x)

    def backward(device):
        x, dy = data(device), data(device)
        return lambda: _backward(dy, x)

    return [
        Case("_relu2_forward_kernel", {"x": t, "y": t, "n": "i32"}, _relu2_tiles, 0, forward),
        Case("_relu2_backward_kernel", {"dy": t, "x": t, "dx": t, "n": "i32"}, _relu2_tiles, 0, backward),
    ]

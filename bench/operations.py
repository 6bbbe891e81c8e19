"""What `hotlap bench kernels` measures: each operation with its inputs, its reference, who provides it, and
its costs.
"""
# B batch, T time, D width, H heads, C head dim, V vocab, N rows = B * T

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from hotlap.kernels.orthogonalize import COEFFICIENTS, orthogonalize, orthogonalize_ref
from hotlap.kernels.relu2 import relu2, relu2_ref
from hotlap.kernels.rms_norm import rms_norm, rms_norm_ref
from hotlap.kernels.rotary import qk_norm_rotary, qk_norm_rotary_ref, rotary_tables

Function = Callable[..., Any]  # of the tensors, to one tensor or a tuple of them

CONTEXT, HEAD_DIM, VOCABULARY = 2048, 128, 32768
WIDTHS = {"d12": 768, "d24": 1536}


@dataclass(frozen=True)
class Operation:
    """One operation at one size. Functions take `tensors`; gradients are of the first `differentiable` ones.
    Costs are of the forward pass and the backward pass.
    """

    name: str
    size: str
    tensors: Callable[[], tuple[Tensor, ...]]
    differentiable: int
    reference: Function
    providers: dict[str, Function]
    bytes: tuple[float, float] = (0, 0)  # the least that must be moved
    flops: tuple[float, float] = (0, 0)  # where products bound it
    directions: tuple[str, ...] = ("forward", "backward", "both")


def operations(
    rows: int, device: torch.device, dtype: torch.dtype, names: tuple[str, ...]
) -> list[Operation]:
    """Every named operation at the sizes of d12 and d24, for `rows` rows of tokens."""
    builders = {
        "rms_norm": rms_norm_at,
        "relu2": relu2_at,
        "rotary": rotary_at,
        "attention": attention_at,
        "linear_cross_entropy": linear_cross_entropy_at,
        "orthogonalize": orthogonalize_at,
    }
    if unknown := sorted(set(names) - set(builders)):
        raise ValueError(f"unknown operation {unknown[0]!r}; known: {', '.join(builders)}")
    return [
        builders[name](size, width, rows, device, dtype)
        for name in names or builders
        for size, width in WIDTHS.items()
    ]


def normal(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return partial(torch.randn, device=device, dtype=dtype)


def with_torch(ours: Function, reference: Function, **others: Function) -> dict[str, Function]:
    """The providers that are always there: ours, the reference as it is, and the reference compiled."""
    return {"hotlap": ours, "eager": reference, "compile": torch.compile(reference, dynamic=False), **others}


def rms_norm_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    others: dict[str, Function] = {"torch": normalised}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        others["liger"] = lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    moved = rows * width * dtype.itemsize
    return Operation(
        "rms_norm", f"{size} {rows}x{width}",
        lambda: (normal(device, dtype)(rows, width), 1 + 0.1 * normal(device, dtype)(width)),
        2, rms_norm_ref, with_torch(rms_norm, rms_norm_ref, **others), (2 * moved, 3 * moved),
    )  # fmt: skip


def relu2_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    moved = rows * 4 * width * dtype.itemsize
    return Operation(
        "relu2", f"{size} {rows}x{4 * width}", lambda: (normal(device, dtype)(rows, 4 * width),),
        1, relu2_ref, with_torch(relu2, relu2_ref), (2 * moved, 3 * moved),
    )  # fmt: skip


def rotary_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    heads, T = width // HEAD_DIM, min(CONTEXT, rows)
    cos, sin = rotary_tables(T, HEAD_DIM, 1e5, device)

    def split(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.view(rows // T, T, 3 * heads, HEAD_DIM).split(heads, dim=2)
        return q, k

    def ours(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rotary(*split(qkv), cos, sin, 1.2)

    def reference(qkv: Tensor) -> tuple[Tensor, ...]:
        table = (cos, sin) if qkv.dtype != torch.float64 else (cos.double(), sin.double())
        return tuple(qk_norm_rotary_ref(x, *table, 1.2) for x in split(qkv))

    moved = rows * 2 * width * dtype.itemsize
    return Operation(
        "rotary", f"{size} {rows}x{3 * width}", lambda: (normal(device, dtype)(rows, 3 * width),),
        1, reference, with_torch(ours, reference), (2 * moved, 3 * moved),
    )  # fmt: skip


def attention_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    heads, T = width // HEAD_DIM, min(CONTEXT, rows)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    providers: dict[str, Function] = {"hotlap": attention, "sdpa": sdpa}
    if device.type == "cuda":
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            providers[f"sdpa-{name.split('_')[0].lower()}"] = partial(sdpa, backend=getattr(SDPBackend, name))
        providers["flex"] = flex_attention(T, device)
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            providers["flash-attn"] = partial(flash_attn_func, causal=True)
    pairs = rows * (T + 1) / 2
    flops = 4 * pairs * width
    return Operation(
        "attention", f"{size} {rows // T}x{T}x{heads}x{HEAD_DIM}",
        lambda: tuple(normal(device, dtype)(rows // T, T, heads, HEAD_DIM) for _ in range(3)),
        3, attention_ref, providers, flops=(flops, 2.5 * flops),
    )  # fmt: skip


def flex_attention(T: int, device: torch.device) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return call


def linear_cross_entropy_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    ours = partial(linear_cross_entropy, softcap=15.0, reduction="mean")
    reference = partial(linear_cross_entropy_ref, softcap=15.0, reduction="mean")
    product = 2 * rows * width * VOCABULARY
    return Operation(
        "linear_cross_entropy", f"{size} {rows}x{width}x{VOCABULARY}",
        lambda: (
            normal(device, dtype)(rows, width),
            0.02 * torch.randn(VOCABULARY, width, device=device),
            torch.randint(VOCABULARY, (rows,), device=device),
        ),
        2, reference, with_torch(ours, reference), flops=(product, 2 * product),
        directions=("forward", "both"),  # ours computes the gradients in the forward pass
    )  # fmt: skip


def orthogonalize_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    layers = 12 if width == WIDTHS["d12"] else 24
    if device.type == "cpu":
        layers = 1  # all of d24's would take a CPU ten seconds a call
    symmetric = 2 * width * width * 4 * width  # X X^T and (...) X of a matrix of width x 4 width
    flops = layers * len(COEFFICIENTS) * (2 * symmetric + 2 * width**3)
    return Operation(
        "orthogonalize", f"{size} {layers}x{width}x{4 * width}",
        lambda: (normal(device, dtype)(layers, width, 4 * width),),
        0, orthogonalize_ref, with_torch(orthogonalize, orthogonalize_ref), flops=(flops, 0),
        directions=("forward",),
    )  # fmt: skip

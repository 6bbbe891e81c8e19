"""The operations of `hotlap bench kernels`; those of attention are in attention.py."""
# B batch, T time, D width, H heads, C head dim, V vocab, N rows = B * T

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.bench.attention import (
    attention_at,
    attention_of_lengths,
    decode_attention_at,
    document_attention_at,
    long_attention_at,
    windowed_attention_at,
)
from hotlap.bench.config import CONTEXT
from hotlap.bench.providers import HEAD_DIM, WIDTHS, Function, Operation, liger, normal, with_torch
from hotlap.common.errors import known
from hotlap.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from hotlap.kernels.decode_linear import (
    linear_residual,
    linear_residual_ref,
    norm_linear,
    norm_linear_ref,
)
from hotlap.kernels.embedding import embedding, embedding_ref
from hotlap.kernels.fp8 import check_fp8, linear_fp8, linear_fp8_ref
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from hotlap.kernels.linear_relu2 import linear_relu2, linear_relu2_ref
from hotlap.kernels.muon import (
    muon_apply,
    muon_apply_ref,
    muon_factors,
    muon_factors_ref,
    muon_momentum,
    muon_momentum_ref,
    muon_squares,
    muon_squares_ref,
)
from hotlap.kernels.orthogonalize import POLAR_EXPRESS, orthogonalize, orthogonalize_ref
from hotlap.kernels.qkv import attention_inputs, attention_inputs_ref, rotary_tables
from hotlap.kernels.relu2 import relu2, relu2_ref
from hotlap.kernels.rms_norm import rms_norm, rms_norm_ref, rms_norm_residual, rms_norm_residual_ref

VOCABULARY = 32768
SOFTCAP = 15.0


def rms_norm_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    others: dict[str, Function] = {"torch": normalised}
    if function := liger("liger_rms_norm", device):
        others["liger"] = partial(function, eps=1e-6, in_place=False)  # in place, gradients would be wrong
    moved = rows * width * dtype.itemsize
    return Operation(
        "rms_norm", f"{size} {rows}x{width}",
        lambda: (normal(device, dtype)(rows, width), 1 + 0.1 * normal(device, dtype)(width)),
        2, rms_norm_ref, with_torch(rms_norm, rms_norm_ref, **others), (2 * moved, 3 * moved),
    )  # fmt: skip


def rms_norm_residual_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    others: dict[str, Function] = {}
    if function := liger("liger_fused_add_rms_norm", device):
        others["liger"] = partial(function, eps=1e-6, in_place=False)
    moved = rows * width * dtype.itemsize
    random = normal(device, dtype)
    return Operation(
        "rms_norm_residual", f"{size} {rows}x{width}",
        lambda: (random(rows, width), random(rows, width), 1 + 0.1 * random(width)),
        3, rms_norm_residual_ref, with_torch(rms_norm_residual, rms_norm_residual_ref, **others),
        (4 * moved, 4 * moved),
    )  # fmt: skip


def relu2_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    others: dict[str, Function] = {}
    if function := liger("liger_relu_squared", device):
        others["liger"] = function
    moved = rows * 4 * width * dtype.itemsize
    return Operation(
        "relu2", f"{size} {rows}x{4 * width}", lambda: (normal(device, dtype)(rows, 4 * width),),
        1, relu2_ref, with_torch(relu2, relu2_ref, **others), (2 * moved, 3 * moved),
    )  # fmt: skip


def linear_relu2_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    matmul = 2 * rows * width * 4 * width
    weight = normal(device, dtype)
    return Operation(
        "linear_relu2", f"{size} {rows}x{width}x{4 * width}",
        lambda: (
            normal(device, dtype)(rows, width),
            weight(4 * width, width) * width**-0.5,
            weight(width, 4 * width) * (4 * width) ** -0.5,
        ),
        3, linear_relu2_ref, with_torch(linear_relu2, linear_relu2_ref), flops=(2 * matmul, 4 * matmul),
    )  # fmt: skip


def decode_linear_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    """The MLP of one new token, with the norm before it and the residual."""
    weight = normal(device, dtype)

    def ours(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return linear_residual(norm_linear(x, w_in, squared_relu=True)[0], w_out, x)

    def reference(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return linear_residual_ref(norm_linear_ref(x, w_in, squared_relu=True)[0], w_out, x)

    return Operation(
        "decode_linear", f"{size} 1x{width}x{4 * width}",
        lambda: (
            normal(device, dtype)(1, width),
            weight(4 * width, width) * width**-0.5,
            weight(width, 4 * width) * (4 * width) ** -0.5,
        ),
        0, reference, with_torch(ours, reference), (8 * width * width * dtype.itemsize, 0),
        directions=("forward",),
    )  # fmt: skip


def attention_inputs_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    """Of a layer with value embeddings."""
    heads, T = width // HEAD_DIM, min(CONTEXT, rows)
    tables = rotary_tables(T, HEAD_DIM, 1e5, device)

    def of(function: Function) -> Function:
        def call(qkv: Tensor, gate: Tensor, value_embedding: Tensor) -> tuple[Tensor, ...]:
            cos, sin = tables if qkv.dtype != torch.float64 else (table.double() for table in tables)
            qkv, value_embedding = (x.view(len(x) // T, T, -1, HEAD_DIM) for x in (qkv, value_embedding))
            return function(qkv, heads, cos, sin, 1.2, gate.view(-1, T, heads), value_embedding)

        return call

    random, moved = normal(device, dtype), rows * width * dtype.itemsize
    ours, reference = of(attention_inputs), of(attention_inputs_ref)
    return Operation(
        "attention_inputs", f"{size} {rows}x{3 * width}",
        lambda: (random(rows, 3 * width), random(rows, heads), random(rows, width)),
        3, reference, with_torch(ours, reference), (7 * moved, 10 * moved),
    )  # fmt: skip


def cross_entropy_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    """Liger's is left out, as it overwrites the logits with their gradients."""
    V = {"d12": VOCABULARY, "d24": 50304}[size]  # the width does not matter: the second is GPT-2's
    moved = rows * V * dtype.itemsize
    return Operation(
        "cross_entropy", f"{size} {rows}x{V}",
        lambda: (3 * normal(device, dtype)(rows, V), torch.randint(V, (rows,), device=device)),
        1, partial(cross_entropy_ref, softcap=SOFTCAP),
        with_torch(partial(cross_entropy, softcap=SOFTCAP), partial(cross_entropy_ref, softcap=SOFTCAP)),
        (moved, 2 * moved),
    )  # fmt: skip


def embedding_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    """Of a float32 table in `dtype`; ids are as frequent as words are (Zipf's law)."""

    def ours(weight: Tensor, ids: Tensor) -> Tensor:
        return embedding(ids, weight, dtype)

    def reference(weight: Tensor, ids: Tensor) -> Tensor:
        return embedding_ref(ids, weight, weight.dtype if weight.dtype == torch.float64 else dtype)

    moved, table = rows * width * dtype.itemsize, 4 * VOCABULARY * width
    return Operation(
        "embedding", f"{size} {rows}x{VOCABULARY}x{width}",
        lambda: (
            torch.randn(VOCABULARY, width, device=device),
            (VOCABULARY ** torch.rand(rows, device=device)).long() - 1,
        ),
        1, reference, with_torch(ours, reference), (moved + 4 * rows * width, moved + table),
    )  # fmt: skip


def linear_cross_entropy_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    others: dict[str, Function] = {}
    if function := liger("liger_fused_linear_cross_entropy", device):

        def fused(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
            return function(x, head.to(x.dtype), targets, softcap=SOFTCAP, accum_dtype=torch.float32)

        others["liger"] = fused
    return _linear_cross_entropy("linear_cross_entropy", SOFTCAP, others, size, width, rows, device, dtype)


def linear_cross_entropy_uncapped_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    """Without softcap, to compare with torch's own on a GPU; on a CPU that takes seconds."""
    others: dict[str, Function] = {}
    if device.type == "cuda" and hasattr(F, "linear_cross_entropy"):  # since torch 2.13

        def chunked(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(x, head.to(x.dtype), targets, options=options)

        others["torch"] = chunked
    return _linear_cross_entropy(
        "linear_cross_entropy_uncapped", 0.0, others, size, width, rows, device, dtype
    )


def _linear_cross_entropy(
    name: str, softcap: float, others: dict[str, Function], size: str, width: int, rows: int, device, dtype
) -> Operation:
    ours = partial(linear_cross_entropy, softcap=softcap, reduction="mean")
    reference = partial(linear_cross_entropy_ref, softcap=softcap, reduction="mean")
    matmul = 2 * rows * width * VOCABULARY
    return Operation(
        name, f"{size} {rows}x{width}x{VOCABULARY}",
        lambda: (
            normal(device, dtype)(rows, width),
            0.02 * torch.randn(VOCABULARY, width, device=device),
            torch.randint(VOCABULARY, (rows,), device=device),
        ),
        2, reference, with_torch(ours, reference, **others), flops=(matmul, 2 * matmul),
        directions=("forward", "both"),  # ours computes the gradients in the forward pass
    )  # fmt: skip


def _layers(width: int, device: torch.device) -> int:
    """The model's number of layers; 1 on a CPU, where all of d24's would take ten seconds per call."""
    return 1 if device.type == "cpu" else 12 if width == WIDTHS["d12"] else 24


def _orthogonalize_flops(layers: int, width: int) -> int:
    symmetric = 2 * width * width * 4 * width  # X X^T and (...) X of a matrix of width x 4 width
    return layers * len(POLAR_EXPRESS) * (2 * symmetric + 2 * width**3)


def orthogonalize_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    layers = _layers(width, device)
    return Operation(
        "orthogonalize", f"{size} {layers}x{width}x{4 * width}",
        lambda: (normal(device, dtype)(layers, width, 4 * width),),
        0, orthogonalize_ref, with_torch(orthogonalize, orthogonalize_ref),
        flops=(_orthogonalize_flops(layers, width), 0),
        directions=("forward",),
    )  # fmt: skip


def muon_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    """A whole Muon step for the matrices of one shape."""
    layers, shape = _layers(width, device), (width, 4 * width)
    beta, lr, decay = (torch.tensor(value, device=device) for value in (0.95, 1.0, 0.1))

    def ours(grad: Tensor, momentum: Tensor, weight: Tensor, second: Tensor) -> Tensor:
        update = orthogonalize(muon_momentum(grad.unbind(), momentum, beta, dtype), norm=width**0.5)
        factors = muon_factors(muon_squares(update), second, width, 0.9)
        muon_apply(weight.unbind(), update, factors, lr, decay)
        return weight

    def reference(grad: Tensor, momentum: Tensor, weight: Tensor, second: Tensor) -> Tensor:
        update = muon_momentum_ref(grad.unbind(), momentum, beta)
        update = orthogonalize_ref(update if update.dtype == torch.float64 else update.to(dtype))
        factors = muon_factors_ref(muon_squares_ref(update), second, width, 0.9)
        muon_apply_ref(weight.unbind(), update, factors, lr, decay)
        return weight

    def tensors() -> tuple[Tensor, ...]:
        grad, momentum, weight = (torch.randn(layers, *shape, device=device) for _ in range(3))
        return grad, momentum, 0.01 * weight, torch.zeros(layers, 1, shape[1], device=device)

    return Operation(
        "muon", f"{size} {layers}x{width}x{4 * width}", tensors,
        0, reference, with_torch(ours, reference), flops=(_orthogonalize_flops(layers, width), 0),
        directions=("forward",),
    )  # fmt: skip


def linear_fp8_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    """Compared with the same layer in `dtype`; it differs by rounding to e4m3 (3 bits) and e5m2 (2 bits)."""
    matmul = 2 * rows * width * 4 * width
    return Operation(
        "linear_fp8", f"{size} {rows}x{width}x{4 * width}",
        lambda: (
            normal(device, dtype)(rows, width),
            torch.randn(4 * width, width, device=device) * width**-0.5,
        ),
        2, linear_fp8_ref, with_torch(linear_fp8, linear_fp8_ref), flops=(matmul, 2 * matmul), rounding=0.1,
    )  # fmt: skip


def _has_fp8(device: torch.device) -> bool:
    try:
        check_fp8(device)
    except ValueError:
        return False
    return True


BUILDERS = {  # the largest shares of a training step first
    "attention": attention_at,
    "windowed_attention": windowed_attention_at,
    "document_attention": document_attention_at,
    "long_attention": long_attention_at,
    "linear_relu2": linear_relu2_at,
    "linear_cross_entropy": linear_cross_entropy_at,
    "orthogonalize": orthogonalize_at,
    "muon": muon_at,
    "linear_fp8": linear_fp8_at,
    "rms_norm": rms_norm_at,
    "rms_norm_residual": rms_norm_residual_at,
    "attention_inputs": attention_inputs_at,
    "decode_attention": decode_attention_at,
    "decode_linear": decode_linear_at,
    "cross_entropy": cross_entropy_at,
    "embedding": embedding_at,
    "relu2": relu2_at,
    "linear_cross_entropy_uncapped": linear_cross_entropy_uncapped_at,
}
LENGTHS = "attention_lengths"  # thirty operations, only if named


def operations(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    names: tuple[str, ...],
    only: tuple[str, ...] = (),
) -> Iterator[Operation]:
    """The named operations (all by default) for `rows` tokens, at each size (only those in `only`, if given):
    d24 first on a GPU, d12 first on a CPU. They are built lazily, because masks take memory.
    """
    for size in only:
        known(size, WIDTHS, "size")
    for name in names:
        known(name, (*BUILDERS, LENGTHS), "operation")
    names = names or tuple(name for name in BUILDERS if name != "linear_fp8" or _has_fp8(device))
    sizes = sorted(WIDTHS.items(), key=lambda item: item[1], reverse=device.type == "cuda")
    makers = [
        partial(_with_rows, BUILDERS[name], size, width, device=device, dtype=dtype)
        for size, width in sizes
        if not only or size in only
        for name in names
        if name != LENGTHS
    ]
    if LENGTHS in names:
        makers += [partial(maker, device=device, dtype=dtype) for maker in attention_of_lengths(rows)]
    return (replace(make(rows), rows=rows, with_rows=make) for make in makers)


def _with_rows(
    build: Callable, size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    return build(size, width, rows, device, dtype)

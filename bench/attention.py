"""Causal attention for `hotlap bench kernels`: full, windowed, by document, and against a KV cache."""
# B batch, T time, S cache positions, H heads, C head dim

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hotlap.bench.config import CONTEXT
from hotlap.bench.models import MEDIAN_DOCUMENT, SPREAD
from hotlap.bench.providers import HEAD_DIM, LONG, Function, Operation, installed, normal
from hotlap.kernels.attention import attention, attention_ref, visible_keys
from hotlap.kernels.decode_attention import append_ref, decode_attention, decode_attention_ref

FLASH_ATTENTION = {  # the module of each version's `flash_attn_func`
    "flash-attn-2": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}


def attention_at(size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype) -> Operation:
    T = min(CONTEXT, rows)
    return _attention("attention", size, T, T, width // HEAD_DIM, HEAD_DIM, rows, device, dtype)


def windowed_attention_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    """Windows of a quarter of the context, as in three of four layers."""
    T = min(CONTEXT, rows)
    return _attention(
        "windowed_attention", size, T, max(1, T // 4), width // HEAD_DIM, HEAD_DIM, rows, device, dtype
    )


def document_attention_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    """Rows of packed documents, as in training."""
    T = min(CONTEXT, rows)
    return _attention(
        "document_attention", size, T, T, width // HEAD_DIM, HEAD_DIM, rows, device, dtype, documents=True
    )


def long_attention_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    T = min(LONG, rows)
    return _attention("long_attention", size, T, T, width // HEAD_DIM, HEAD_DIM, rows, device, dtype)


def attention_of_lengths(rows: int) -> list[Callable[..., Operation]]:
    """Builders of operations: head dims 64 and 128 at width 2048, lengths of 1k to 16k, with full attention
    and windows of 512 and 1024.
    """
    return [
        partial(_attention, "attention_lengths", f"window {window}", T, window, 2048 // C, C)
        for C, T in itertools.product((64, 128), (1024, 2048, 4096, 8192, 16384))
        for window in sorted({512, min(1024, T), T})
        if rows >= T
    ]


def _attention(
    name: str,
    size: str,
    T: int,
    window: int,
    heads: int,
    C: int,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    documents: bool = False,
) -> Operation:
    T, window = min(T, rows), min(window, rows)
    start = document_start(rows // T, T, device) if documents else None
    auto = partial(attention, window=window, document_start=start)
    providers: dict[str, Function] = {"hotlap": auto, "sdpa": _sdpa(window, T, device, start=start)}
    if device.type == "cuda":  # where `auto` may pick another library's kernel
        providers["hotlap"] = partial(auto, backend="triton")
        providers |= {"hotlap-auto": auto, **_others(window, T, rows, device, start)}
    pairs = rows // T * (window * (window + 1) / 2 + (T - window) * window)  # (query, visible key)
    if start is not None:
        pairs = (torch.arange(1, T + 1, device=device) - start).sum().item()
    flops = 4 * pairs * heads * C
    return Operation(
        name, f"{size} {rows // T}x{T}x{heads}x{C}",
        lambda: tuple(normal(device, dtype)(rows // T, T, heads, C) for _ in range(3)),
        3, partial(attention_ref, window=window, document_start=start), providers, flops=(flops, 2.5 * flops),
    )  # fmt: skip


def document_start(B: int, T: int, device: torch.device) -> Tensor:
    """(B, T) int32: where each token's document starts. Lengths are distributed as in FineWeb."""
    random = np.random.default_rng(0)
    lengths = 1 + random.lognormal(np.log(MEDIAN_DOCUMENT), SPREAD, (B, T)).astype(int)
    ends = lengths.cumsum(1)
    starts = np.zeros((B, T), np.int32)
    for row, places in zip(starts, ends, strict=True):
        inside = places[places < T]
        row[inside] = inside
    return torch.from_numpy(np.maximum.accumulate(starts, 1)).to(device)


def decode_attention_at(
    size: str, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Operation:
    """One new token of each sequence against a full context."""
    heads, S = width // HEAD_DIM, min(CONTEXT, rows)
    B = rows // S
    slots, lengths = torch.arange(B, device=device), torch.full((B,), S - 1, device=device)

    def reference(*tensors: Tensor) -> Tensor:
        q, k, v, *cache = tensors
        append_ref(k, v, *cache, slots, lengths)
        return decode_attention_ref(q, *cache, slots, lengths)

    def ours(*tensors: Tensor) -> Tensor:
        return decode_attention(*tensors, slots, lengths)

    providers = {"hotlap": ours, "eager": reference}
    function = installed("flash_attn.flash_attn_interface", "flash_attn_with_kvcache")
    if device.type == "cuda" and function:
        held = lengths.int()

        def flash(q: Tensor, k: Tensor, v: Tensor, *cache: Tensor) -> Tensor:
            return function(q, *cache, k, v, cache_seqlens=held, causal=True)

        providers["flash-attn-2"] = flash
    random = normal(device, dtype)
    return Operation(
        "decode_attention", f"{size} {B}x{S}x{heads}x{HEAD_DIM}",
        lambda: tuple(random(B, length, heads, HEAD_DIM) for length in (1, 1, 1, S, S)),
        0, reference, providers, (2 * B * S * width * dtype.itemsize, 0), directions=("forward",),
    )  # fmt: skip


def _others(
    window: int, T: int, rows: int, device: torch.device, start: Tensor | None
) -> dict[str, Function]:
    """Providers that need a GPU: torch's backends, and the installed versions of flash-attn."""
    providers = {"flex": _flex(window, T, device, start)}
    if window == T and start is None:  # the backends have no windows, and a mask would select another backend
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            label = f"sdpa-{backend.split('_')[0].lower()}"
            providers[label] = _sdpa(window, T, device, getattr(SDPBackend, backend))
    if function := installed("torch.nn.attention.varlen", "varlen_attn"):
        providers["varlen"] = _varlen(function, window, T, rows, device, start)
    if start is not None:
        return providers
    for label, module in FLASH_ATTENTION.items():
        if function := installed(module, "flash_attn_func"):
            providers[label] = _flash_attention(function, window, T)
    return providers


def _sdpa(
    window: int,
    T: int,
    device: torch.device,
    backend: SDPBackend | None = None,
    start: Tensor | None = None,
) -> Function:
    mask = None if window == T and start is None else visible_keys(T, T, window, start, device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2)

    return call


def _flex(window: int, T: int, device: torch.device, start: Tensor | None = None) -> Function:
    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query - key < window)
        return seen if start is None else seen & (key >= start[b, query])

    @functools.cache  # built in the first call, where a failure becomes a row
    def mask() -> BlockMask:
        return create_block_mask(visible, None if start is None else len(start), None, T, T, device=device)

    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask()).transpose(1, 2)

    return call


def _varlen(
    function: Function, window: int, T: int, rows: int, device: torch.device, start: Tensor | None = None
) -> Function:
    starts = torch.arange(0, rows + 1, T, dtype=torch.int32, device=device)
    if start is not None:
        first = (start + starts[:-1, None]).flatten().unique()  # of each document, over all rows
        starts = torch.cat((first, starts[-1:])).int()
    before = -1 if window == T else window - 1  # visible keys before the query's own; -1: all

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H, C)
        return function(*flat, starts, starts, T, T, window_size=(before, 0)).view_as(q)

    return call


def _flash_attention(function: Function, window: int, T: int) -> Function:
    options = {} if window == T else {"window_size": (window - 1, 0)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = function(q, k, v, causal=True, **options)
        return y[0] if isinstance(y, tuple) else y  # some versions return the logsumexp too

    return call

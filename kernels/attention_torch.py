"""Causal attention by existing kernels: torch's fused kernels and flash-attn."""
# B batch, T queries, S keys, H heads, K kv heads, C head dim

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hotlap.common.log import log

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa_takes(backend: str, device: torch.device, dtype: torch.dtype, C: int, S: int, grouped: bool) -> bool:
    """Whether torch's "flash" or "cudnn" kernel takes plain causal attention of S tokens on a GPU, forward
    and backward, and torch's setting of determinism allows it. grouped: heads share keys.
    """
    if device.type != "cuda":
        return False
    q, k = (
        torch.empty(1, heads, S, C, dtype=dtype, device=device, requires_grad=True)
        for heads in (1 + grouped, 1)
    )
    question = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, grouped)
    if backend == "cudnn":
        return torch.backends.cuda.can_use_cudnn_attention(question)
    return torch.backends.cuda.can_use_flash_attention(question)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """torch's fused kernels: "flash", "cudnn", or "sdpa" (torch chooses). Plain causal, T equal to S."""

    def call() -> Tensor:
        return F.scaled_dot_product_attention(
            *((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v)),
            is_causal=True,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )

    if backend == "sdpa":
        return call().transpose(1, 2)
    with sdpa_kernel(SDPA[backend]):
        return call().transpose(1, 2)


@functools.cache
def flash_attn_function(device: torch.device) -> Callable | None:
    """flash-attn's function: of version 4 on Hopper and Blackwell where installed, else of 2; or None.

    Version 4 is not a torch operation: a compiler breaks the graph there.
    """
    if device.type != "cuda":
        return None
    new = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    for module in ("flash_attn.cute", "flash_attn") if new else ("flash_attn",):
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError) as error:
            if not (isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")):
                log.warning("attention: %s cannot be used: %s", module, error)
            continue
        return torch.compiler.disable(function) if module == "flash_attn.cute" else function
    return None


def attention_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, scale: float
) -> Tensor:
    """flash-attn, for rows of one document. Its window (left, right) does not count the query's own key."""
    function = flash_attn_function(q.device)
    if function is None or q.dtype == torch.float32:
        raise ValueError(
            "backend 'flash-attn' needs its package (pip install flash-attn), a GPU and float16 or bfloat16; "
            f"given is {str(q.dtype).removeprefix('torch.')} on {q.device.type!r}; try backend='auto'"
        )
    options: dict[str, Any] = {}  # set options only if asked: versions have different defaults
    if window:
        options["window_size"] = (window - 1, 0)
    if softcap:
        options["softcap"] = softcap
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    y = function(q, k, v, softmax_scale=scale, causal=True, **options)
    return y[0] if isinstance(y, tuple) else y

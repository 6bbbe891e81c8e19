"""Causal attention by what is there already: torch's fused kernels and flash-attn."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """torch's fused kernels, "flash" or "cudnn", or "sdpa", its own choice: plain causal, T equal to S."""

    def call() -> Tensor:
        return F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            is_causal=True,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )

    if backend == "sdpa":
        return call().transpose(1, 2)
    with sdpa_kernel(SDPA[backend]):
        return call().transpose(1, 2)


@functools.cache
def flash_attn_function():
    """flash-attn's function: of version 4 on Hopper and Blackwell where installed, else of 2; or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    if torch.cuda.get_device_capability() >= (9, 0) and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    return flash_attn_func


def attention_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, scale: float
) -> Tensor:
    """flash-attn, for rows of one document. Its window (left, right) counts the keys beside the own one."""
    function = flash_attn_function()
    if function is None:
        raise ImportError("attention's backend flash-attn needs the package: pip install flash-attn")
    y = function(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap,
    )
    return y[0] if isinstance(y, tuple) else y

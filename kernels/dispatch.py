"""What the machine can do, asked in one place and only when needed."""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

log = logging.getLogger("hotlap")


@functools.cache
def kernel_choice() -> str:
    """`torch` or `triton`, from HOTLAP_KERNELS; unset means torch, which has every operation."""
    choice = os.environ.get("HOTLAP_KERNELS", "torch")
    if choice != "torch":
        raise ValueError(f"HOTLAP_KERNELS={choice!r} is not available; this version has: torch")
    log.info("kernels: %s", choice)
    return choice


def use_triton(x: Tensor) -> bool:
    """Whether operations on x run our Triton kernels rather than the torch reference."""
    return kernel_choice() == "triton" and x.is_cuda


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def fast_dtype(device_type: str) -> torch.dtype:
    """The dtype in which the device multiplies matrices fastest at an accuracy that training bears.

    bfloat16 on GPUs that have it and on CPUs with bf16 dot products (AVX512-BF16 or AMX): measured 4.5 times
    float32 on two cores of a Zen 5 EPYC. Else float32.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device_type == "cpu" and bf16 else torch.float32

"""An operation to measure: its inputs, its reference, who provides it, and its costs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hotlap.common.log import log

Function = Callable[..., Any]  # of the tensors, to one tensor or a tuple of them

CONTEXT, LONG, HEAD_DIM = 2048, 8192, 128
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
    flops: tuple[float, float] = (0, 0)  # where matmuls bound it
    directions: tuple[str, ...] = ("forward", "backward", "both")
    rounding: float = 0  # what results may be off by in any case, where it is the operation's own to round
    rows: int = 0  # of tokens
    with_rows: Callable[[int], Operation] | None = None  # the same for another number of rows

    def case(self, direction: str = "") -> str:
        """Its name in the results, as a whole or in one direction."""
        return " ".join(filter(None, (self.name, direction, self.size)))

    def cases(self) -> set[str]:
        """Every name that its rows in the results have."""
        return {self.case(), *map(self.case, self.directions)}


@functools.cache
def installed(module: str, name: str) -> Function | None:
    """A function of a package, or None where that is not installed or cannot be imported, which is logged."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or error.name.split(".")[0] != package:
            log.warning("%s of %s cannot be used: %s", name, module, error)
        return None


def liger(name: str, device: torch.device) -> Function | None:
    """A function of Liger's, which run on GPUs alone."""
    return installed("liger_kernel.transformers.functional", name) if device.type == "cuda" else None


def normal(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return partial(torch.randn, device=device, dtype=dtype)


def with_torch(ours: Function, reference: Function, **others: Function) -> dict[str, Function]:
    """The providers that are always there: ours, the reference as it is, and the reference compiled."""
    return {"hotlap": ours, "eager": reference, "compile": torch.compile(reference, dynamic=False), **others}

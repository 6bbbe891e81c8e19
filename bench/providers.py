"""An operation to benchmark: its inputs, its reference, its providers and its costs."""

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

Function = Callable[..., Any]  # of tensors, returning one tensor or a tuple

LONG, HEAD_DIM = 8192, 128
WIDTHS = {"d12": 768, "d24": 1536}


@dataclass(frozen=True)
class Operation:
    """One operation at one size. Functions take `tensors`; the first `differentiable` ones get gradients.
    Costs are for the forward pass and the backward pass.
    """

    name: str
    size: str
    tensors: Callable[[], tuple[Tensor, ...]]
    differentiable: int
    reference: Function
    providers: dict[str, Function]
    bytes: tuple[float, float] = (0, 0)  # that must be moved at least
    flops: tuple[float, float] = (0, 0)  # if matmuls bound it
    directions: tuple[str, ...] = ("forward", "backward", "both")
    rounding: float = 0  # error always allowed, for an operation that rounds by design
    rows: int = 0  # of tokens
    with_rows: Callable[[int], Operation] | None = None  # the same operation with another number of rows

    def case(self, direction: str = "") -> str:
        """Its name in the results, for all directions or one."""
        return " ".join(filter(None, (self.name, direction, self.size)))

    def cases(self) -> set[str]:
        """All names that its rows can have in the results."""
        return {self.case(), *map(self.case, self.directions)}


@functools.cache
def installed(module: str, name: str) -> Function | None:
    """A function of a package; None if it is not installed, or fails to import, which is logged."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or error.name.split(".")[0] != package:
            log.warning("%s of %s cannot be used: %s", name, module, error)
        return None


def liger(name: str, device: torch.device) -> Function | None:
    """A function of Liger, which needs a GPU."""
    return installed("liger_kernel.transformers.functional", name) if device.type == "cuda" else None


def normal(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return partial(torch.randn, device=device, dtype=dtype)


def with_torch(ours: Function, reference: Function, **others: Function) -> dict[str, Function]:
    """Providers: ours, the reference in eager mode and compiled, and others."""
    return {"hotlap": ours, "eager": reference, "compile": torch.compile(reference, dynamic=False), **others}

"""What a GPU needs of the host: copies that do not wait for it, CUDA graphs, and dtypes that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
NO_FLOAT64 = {"mps"}  # types of devices


def to_device(
    numbers: list, device: torch.device, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """A list of numbers, nested or not, as a tensor on the device, which is not waited for.

    out: a tensor there to copy them to.
    """
    cuda = device.type == "cuda"
    host = torch.tensor(numbers, dtype=dtype, pin_memory=cuda)
    return host.to(device, non_blocking=cuda) if out is None else out.copy_(host, non_blocking=cuda)


def widest(device: torch.device) -> torch.dtype:
    """The dtype of sums that should not round: float64, or float32 on a Mac's GPU, which has no wider one."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def captured(calls: Callable[[], T], **options: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of what calls() launches, which must have run before, and what it returns: the tensors
    that the graph writes. options: of `torch.cuda.graph`.

    RuntimeError if it cannot be captured, for example because it waits for the GPU.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, **options):
            outputs = calls()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # torch does not, if a capture fails
        options.pop("pool", None)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), **options):
            pass  # a successful capture makes torch's random generator usable again
        raise
    return graph, outputs

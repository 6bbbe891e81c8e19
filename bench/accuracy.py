"""Check a provider's outputs and gradients against the reference in float64.

Its error may be twice that of the reference in the same dtype. The check runs at the timed size, or with
fewer rows if float64 does not fit in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hotlap.bench.config import CONTEXT
from hotlap.bench.providers import Function, Operation
from hotlap.common.log import log
from hotlap.kernels.cpu import library
from hotlap.kernels.dispatch import kernel_choice

ERROR_FACTOR = 2.0  # allowed error, as a multiple of the reference's in the same dtype
# Error that is always allowed: rounding of the dtype.
SMALLEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CPU_ROWS = 2048  # at most, because float64 is slow there
FEWEST_ROWS = 64


@dataclass(frozen=True)
class RightAnswer:
    """Inputs, exact results, and the error allowed for each result."""

    operation: Operation  # with the number of rows to compare
    tensors: tuple[Tensor, ...]
    exact: list[Tensor]  # outputs, then gradients, in float64
    limits: list[float]  # relative error in the Frobenius norm


def right_answer(operation: Operation, device: torch.device) -> RightAnswer:
    """The right answer of an operation at its size, or with as many rows as fit in memory in float64."""
    rows = operation.rows if device.type == "cuda" else min(operation.rows, CPU_ROWS)
    while True:
        small = operation if rows == operation.rows else operation.with_rows(rows)
        try:
            return _right_answer(small)
        except torch.OutOfMemoryError:
            if rows <= FEWEST_ROWS:
                raise
        rows = fewer_rows(rows)
        torch.cuda.empty_cache()
        log.info("%s: checking %d rows, as float64 does not fit in memory", operation.case(), rows)


def fewer_rows(rows: int) -> int:
    """About half, in multiples of the context if there is more than one."""
    return max(CONTEXT, rows // 2 // CONTEXT * CONTEXT) if rows > CONTEXT else rows // 2


def _right_answer(operation: Operation) -> RightAnswer:
    torch.manual_seed(0)
    tensors = operation.tensors()
    wide = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    exact = outputs_and_gradients(operation, operation.reference, wide)
    floor = max(SMALLEST_ERROR[tensors[0].dtype], operation.rounding)
    off = distances(outputs_and_gradients(operation, operation.reference, tensors), exact)
    return RightAnswer(operation, tensors, exact, [max(floor, ERROR_FACTOR * error) for error in off])


def mistake(right: RightAnswer, provider: str) -> str:
    """How a provider is wrong; empty if it is right. Raises what the provider raises."""
    operation = right.operation
    with poisoned_memory() if provider.startswith("hotlap") else contextlib.nullcontext():
        found = outputs_and_gradients(operation, operation.providers[provider], right.tensors)
    off = distances(found, right.exact)
    for i, (error, most) in enumerate(zip(off, right.limits, strict=True)):
        if not error <= most:
            what = "gradient" if i >= len(off) - operation.differentiable else "output"
            return f"WRONG: {what} has error {error:.2g}, allowed {most:.2g}"
    return ""


def is_plain_torch(right: RightAnswer, provider: str) -> bool:
    """Whether our provider runs none of our kernels, as where there is none in C for an operation."""
    choice = kernel_choice(right.tensors[0].device.type)
    if choice != "c":
        return choice == "torch"
    with mock.patch.dict(library.called, clear=True):
        outputs_and_gradients(right.operation, right.operation.providers[provider], right.tensors)
        return not library.called


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make torch.empty return NaN, so that reading unwritten memory shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        x = empty(*size, **options)
        if torch.compiler.is_compiling() or _get_current_dispatch_mode():  # compiled code allocates by itself
            return x
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        elif x.dtype == torch.int8:
            x.fill_(127)  # the bits of NaN in fp8
        return x

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The relative error of each tensor in the Frobenius norm."""
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(found, exact, strict=True)
    ]


def outputs_and_gradients(
    operation: Operation, function: Function, tensors: tuple[Tensor, ...]
) -> list[Tensor]:
    """Outputs, then input gradients, for output gradients that are the same for every provider."""
    inputs = [t.detach().clone().requires_grad_(i < operation.differentiable) for i, t in enumerate(tensors)]
    outputs = as_tuple(function(*inputs))
    found = [output.detach() for output in outputs]
    if not operation.differentiable:
        return found
    generator = torch.Generator(found[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    return [*found, *torch.autograd.grad(outputs, inputs[: operation.differentiable], grads)]


def as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)

"""How kernels are tested: against float64, and against how well torch does in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from hotlap.kernels import muon
from hotlap.kernels.dispatch import kernel_choice, kernel_op, wrap_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What float32 results may be off by: a rounding or two; and more on a GPU, whose exp2, division and square
# root are approximations good to two units in the last place, of values that cancel.
SMALLEST_ERROR = 2**-19 if DEVICE.type == "cuda" else 2**-22


def error(value: Tensor, exact: Tensor, scale: float = 1e-30) -> float:
    """The norm of the difference, as a share of the norm of the exact value, or of a larger scale."""
    assert value.shape == exact.shape
    return ((value.double() - exact).norm() / exact.norm().clamp(min=scale)).item() if exact.numel() else 0.0


def outputs_and_gradients(function: Callable, inputs: Sequence, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What function returns, and the gradients of the inputs that ask for one."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gradients = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, gradients))


def as_double(x):
    """x in float64, a leaf of its own."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def check(
    function: Callable,
    reference: Callable,
    inputs: Sequence,
    gradients: Sequence[Tensor],
    scale: float | Sequence[float] = 1e-30,
) -> None:
    """Outputs and gradients are at most twice as far from float64 as those of the reference in the dtype.

    scale: the norm, of all results or of each, that errors are a share of where the exact one is smaller.
    """
    ours = outputs_and_gradients(function, inputs, gradients)
    torchs = outputs_and_gradients(reference, inputs, gradients)
    exact = outputs_and_gradients(reference, [as_double(x) for x in inputs], gradients)
    scales = [scale] * len(ours) if isinstance(scale, float) else scale
    for i, (x, y, z, least) in enumerate(zip(ours, torchs, exact, scales, strict=True)):
        assert x.dtype == y.dtype
        ours, torchs = error(x, z, least), error(y, z, least)
        if x.numel() == 1:  # which torch's rounding may have hit by luck
            torchs = max(torchs, torch.finfo(x.dtype).eps / 2)
        assert ours <= 2 * torchs + SMALLEST_ERROR, (
            f"result {i} is off by {ours:.2e}, and torch's by {torchs:.2e}"
        )


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


def far_apart(x: Tensor) -> Tensor:
    """A copy of x (3, ...), whose three parts lie 2^30 elements apart, and alone take memory (on a CPU).

    So the stride fits 32 bits, and the place of the last part does not: a kernel that multiplies in 32 bits
    reads outside of the tensor, which ends the process.
    """
    x = x.detach()
    far = torch.empty_strided(x.shape, (2**30, *x[0].contiguous().stride()), dtype=x.dtype, device=x.device)
    return far.copy_(x)


def far_rows(width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Three such rows."""
    return far_apart(random(3, width, grad=False, dtype=dtype))


def chosen(operation: kernel_op) -> CustomOpDef:
    """The operation of torch that runs for tensors on DEVICE: the one in C, where C is chosen."""
    return (operation.c if operation.c and kernel_choice(DEVICE.type) == "c" else operation).registered()


def launches_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The names of the kernels that a module launches from now on, and their programs."""
    seen = []

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            seen.append((self.kernel.fn.__name__, *grid))
            return wrap_triton(self.kernel)[grid]

    monkeypatch.setattr(module, "wrap_triton", Launcher)
    return seen


def muon_move(
    weight: Tensor, update: Tensor, second: Tensor, lr: Tensor, decay: Tensor, beta2: float
) -> None:
    """What follows the orthogonalisation in a step of Muon on whole matrices."""
    factors = muon.muon_factors(muon.muon_squares(update), second, min(weight.shape[-2:]), beta2)
    muon.muon_apply(weight.unbind(), update, factors, lr, decay)


def muon_move_ref(
    weight: Tensor, update: Tensor, second: Tensor, lr: Tensor, decay: Tensor, beta2: float
) -> None:
    """The same, stated at once."""
    S = min(weight.shape[-2:])
    update = update * (S**0.5 / (update.norm(dim=(-2, -1), keepdim=True) + muon.EPS))
    along = -1 if second.shape[-1] == 1 else -2
    second.lerp_(update.square().mean(along, keepdim=True), 1 - beta2)
    scaled = update * (second + muon.EPS).rsqrt()
    scaled = scaled * (S**0.5 / (scaled.norm(dim=(-2, -1), keepdim=True) + muon.EPS))
    weight.sub_(lr * (scaled + decay * weight * (scaled * weight >= 0)))


def document_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """document_start (1, tokens) of a row of packed documents; cu_seqlens: where they begin, and the end."""
    t = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1][None]

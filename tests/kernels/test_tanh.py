"""tanh in kernels is accurate relative to itself, and so is what a softcap makes of small scores."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_tools import DEVICE, SMALLEST_ERROR, error, outputs_and_gradients, random

from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.cross_entropy import cross_entropy_ref
from hotlap.kernels.dispatch import INTERPRETED, jit, tl, triton
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.tanh import tanh


@jit
def _tanh_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tanh(tl.load(x + i, i < n)), i < n)


def test_tanh_is_off_by_a_few_roundings_of_itself_at_every_size(triton_kernels):
    sizes = torch.logspace(-30, 2, 1000, device=DEVICE)
    near = torch.linspace(0.5, 0.7, 1000, device=DEVICE)  # where the two forms meet
    x = torch.cat((sizes, -sizes, near, torch.tensor([0.0, float("inf"), -float("inf")], device=DEVICE)))
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)))
    exact = x.double().tanh()
    assert ((y.double() - exact).abs() <= 4e-7 * exact.abs()).all()


def test_the_tanh_of_nan_is_nan(triton_kernels):
    x, y = torch.full((16,), float("nan"), device=DEVICE), torch.zeros(16, device=DEVICE)
    _tanh_kernel[(1,)](x, y, 16, BLOCK=16)
    assert y.isnan().all()


@pytest.mark.parametrize("kernels", ["torch", "triton", "c"])
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_losses_of_capped_logits_are_exact_at_every_size(size, kernels, request, choose_kernels):
    choose_kernels("torch") if kernels == "torch" else request.getfixturevalue(f"{kernels}_kernels")
    x, head = size * random(8, 16, grad=False), torch.eye(16, device=DEVICE)
    targets, one = torch.arange(8, device=DEVICE), [torch.ones((), device=DEVICE)]
    inputs = [t.detach().requires_grad_() for t in (x, head)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for cap in (1.0, 30.0):

        def ours(x, w, cap=cap):
            return linear_cross_entropy(x, w, targets, cap)

        def reference(x, w, cap=cap):
            return cross_entropy_ref(x @ w.T, targets, cap, "sum")

        found, exact = outputs_and_gradients(ours, inputs, one), outputs_and_gradients(reference, wide, one)
        for result, wanted in zip(found, exact, strict=True):
            assert error(result, wanted) < max(3e-7, SMALLEST_ERROR)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has attention in 16 bits alone")
@pytest.mark.parametrize("size", [0.03, 1.0, 3.0])
def test_gradients_of_capped_attention_are_as_exact_as_torchs(size, triton_kernels):
    inputs = [(size * random(1, 64, 1, 16, seed=i)).detach().requires_grad_() for i in range(2)]
    inputs.append(random(1, 64, 1, 16, seed=2))
    dy = [random(1, 64, 1, 16, seed=3, grad=False)]

    def of(function, given, **options):
        return outputs_and_gradients(lambda *x: function(*x, softcap=30.0, **options), given, dy)

    ours, plain = of(attention, inputs, backend="triton"), of(attention_ref, inputs)
    exact = of(attention_ref, [x.detach().double().requires_grad_() for x in inputs])
    for one, other, wanted in zip(ours, plain, exact, strict=True):
        assert error(one, wanted) < 2 * error(other, wanted) + 2e-7

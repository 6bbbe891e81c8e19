import pytest
import torch
from helpers.kernel_tools import DTYPES, check, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import relu2 as module
from hotlap.kernels.relu2 import relu2, relu2_ref

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 200, 1025, 16384])
def test_is_as_exact_as_torch(size, dtype):
    x, dy = random(size, dtype=dtype), random(size, seed=1, grad=False)
    check(relu2, relu2_ref, (x,), [dy])


def test_strides_of_inputs_and_gradients_do_not_matter():
    for view in (lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:1].expand(9, 40)):
        x = view(random(40, 40)).detach().requires_grad_()
        check(relu2, relu2_ref, (x,), [view(random(40, 40, seed=1, grad=False))])
        relu2(x).sum().backward()  # a gradient of stride 0


def test_nothing_gives_nothing():
    x = random(3, 0)
    relu2(x).sum().backward()
    assert x.grad.shape == (3, 0)


def test_nan_stays_nan_and_minus_infinity_becomes_zero():
    x = torch.tensor([float("nan"), float("-inf"), -0.0]).to(random(1).device)
    assert relu2(x)[0].isnan() and torch.equal(relu2(x)[1:], torch.zeros_like(x[1:]))


def test_two_runs_agree_bit_for_bit():
    x, dy = random(5000), random(5000, seed=1, grad=False)
    first, second = (outputs_and_gradients(relu2, (x,), [dy]) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    x = random(3, 40)
    opcheck(module._relu2.registered(), (x,))
    opcheck(module._relu2.registered(), (x.detach().T.requires_grad_(),))
    opcheck(module._relu2_backward.registered(), (x.detach(), x.detach()))


def test_compiles_whole_to_the_same_results():
    def function(x):
        return relu2(x.sin()) * 2

    inputs, dy = (random(5, 33),), random(5, 33, seed=2, grad=False)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, [dy])
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)

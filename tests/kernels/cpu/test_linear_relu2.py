"""The MLP with ReLU^2 in C against torch's."""

import pytest
import torch
from helpers.kernel_tools import chosen
from torch.library import opcheck

from hotlap.kernels import linear_relu2 as module
from hotlap.kernels.linear_relu2 import linear_relu2

pytestmark = pytest.mark.usefixtures("c_kernels")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights():
    return random(13, 7, seed=1) / 3, random(7, 13, seed=2) / 3


VIEWS = {
    "as it is": lambda x: x, "expanded": lambda x: x[:1].expand(5, 7),
    "channels apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.T.contiguous().T, "one row": lambda x: x[:1], "no row": lambda x: x[:0],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("view", VIEWS)
def test_outputs_and_gradients_are_torchs_in_any_layout(view, dtype, choose_kernels):
    results = []
    for kernels in ("c", "torch"):
        choose_kernels(kernels)
        given = [x.clone().requires_grad_() for x in (random(5, 7, dtype=dtype), *weights())]
        y = linear_relu2(VIEWS[view](given[0]), *given[1:])
        upstream = VIEWS[view](random(5, 7, dtype=dtype, seed=3))
        results.append([y.detach(), *torch.autograd.grad(y, given, upstream)])
    tolerances = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, **tolerances)


def test_compiles_whole_to_the_same_results():
    given = [x.requires_grad_() for x in (random(5, 7), *weights())]
    results = []
    for function in (torch.compile(linear_relu2, fullgraph=True, dynamic=False), linear_relu2):
        y = function(*given)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), given)])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_operations_keep_the_rules_of_torch():
    x, w_in, w_out = random(5, 7), *weights()
    opcheck(chosen(module._linear_relu2), [t.clone().requires_grad_() for t in (x, w_in, w_out)])
    _, a = module._linear_relu2(x, w_in, w_out)
    opcheck(chosen(module._linear_relu2_backward), (random(5, 7, seed=3), x, w_in, w_out, a))

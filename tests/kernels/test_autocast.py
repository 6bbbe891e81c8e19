"""Under torch.autocast, every operation works as torch's own do: matmuls cast what they are given, losses and
norms keep float32, and gradients have the dtypes of the inputs.
"""

import pytest
import torch
from helpers.kernel_cases import F32, cases, normal, weight
from helpers.kernel_tools import DEVICE, error, random
from torch import Tensor

from hotlap.kernels.attention import attention
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.linear_relu2 import linear_relu2
from hotlap.kernels.rms_norm import rms_norm_residual


@pytest.fixture(params=["torch", "triton", "c"])
def kernels(request, choose_kernels):
    if request.param == "torch":
        return choose_kernels("torch")
    return request.getfixturevalue(f"{request.param}_kernels")


def results(function, inputs) -> tuple[Tensor, ...]:
    found = function(*inputs)
    return tuple(y for y in (found if isinstance(found, tuple) else (found,)) if y is not None)


def backward(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((y.flatten() * random(y.numel(), seed=9, grad=False)).sum() for y in outputs)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(cases(F32)))
def test_results_have_the_dtypes_of_torch_and_gradients_those_of_the_inputs(name, dtype, kernels):
    case = cases(dtype)[name]
    if "fp8" in name and DEVICE.type == "cpu" and dtype == torch.float16:
        pytest.skip("torch has no such product on CPUs")
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in case.inputs]
    want = results(case.reference, exact)
    with torch.autocast(DEVICE.type, dtype):
        found = results(case.function, case.inputs)
    assert [y.dtype for y in found] == [wanted or dtype for wanted in case.dtypes]
    learning = [x for x in case.inputs if x.requires_grad]
    if learning and want[0].requires_grad:
        gradients = backward(found, learning)
        with torch.autocast(DEVICE.type, dtype):  # where torch's own operations work, too
            within = backward(results(case.function, case.inputs), learning)
        assert [g.dtype for g in gradients] == [x.dtype for x in learning]
        for one, other in zip(gradients, within, strict=True):
            assert torch.equal(one, other)
        found += tuple(gradients)
        want += tuple(backward(want, [x for x in exact if x.requires_grad]))
    for y, wanted in zip(found, want, strict=True):
        assert error(y, wanted.double()) < case.off


@pytest.mark.parametrize("name", [name for name in cases(F32) if "fp8" not in name])  # which has no float32
def test_where_autocast_is_switched_off_nothing_is_cast(name):
    case = cases(F32)[name]
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.autocast(DEVICE.type, enabled=False):
        found = results(case.function, case.inputs)
    for y, wanted in zip(found, results(case.function, case.inputs), strict=True):
        assert torch.equal(y, wanted) and y.dtype == F32


@pytest.mark.parametrize("name", ["linear_relu2", "attention", "linear_cross_entropy, sum"])
def test_a_backward_pass_of_float32_under_autocast_is_one_of_float32(name, c_kernels):
    case = cases(F32)[name]
    wanted = backward(results(case.function, case.inputs), case.inputs)
    outputs = results(case.function, case.inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = backward(outputs, case.inputs)
    for gradient, expected in zip(found, wanted, strict=True):
        assert torch.equal(gradient, expected)


def test_compiled_code_is_cast_alike():
    def step(x, residual, w_in, w_out, head):
        normalised, total = rms_norm_residual(linear_relu2(x, w_in, w_out), residual)
        heads = normalised.view(1, 6, 2, 16)
        y = attention(heads, heads, heads, window=3).reshape(6, 32)
        return linear_cross_entropy(y, head, torch.arange(6, device=DEVICE), 15.0), total

    inputs = [*cases(torch.bfloat16)["linear_relu2"].inputs, weight(11, 32)]
    inputs.insert(1, normal(6, 32, seed=3))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        both = [results(function, inputs) for function in (step, compiled)]
    for one, other in zip(*([*found, *backward(found, inputs)] for found in both), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)

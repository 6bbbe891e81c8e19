"""What compilers are told about the strides of results is what they get, whatever those of the inputs are."""

import pytest
import torch
from helpers.kernel_cases import F32, cases
from helpers.kernel_tools import outputs_and_gradients, random
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hotlap.kernels.qkv import attention_inputs, rotary_tables

# decoding on a CPU reads lengths, and Muon's step numbers, which an imitation of a tensor does not have
NAMES = [name for name in cases(F32) if "decode" not in name and name != "muon"]


@pytest.fixture(params=["torch", "triton", "c"])
def kernels(request, choose_kernels):
    """Every path. Returns its name."""
    if request.param == "torch":
        choose_kernels("torch")
    else:
        request.getfixturevalue(f"{request.param}_kernels")
    return request.param


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides: with gaps between elements, or with another dimension last in memory, which for
    four of them is torch's channels_last.
    """
    y = x.detach()
    if layout == "gaps":
        y = torch.stack((y, y), -1)[..., 0]
    elif x.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    elif x.dim():
        y = y.movedim(0, -1).contiguous().movedim(-1, 0)
    return y.requires_grad_(x.requires_grad)


def strides(results: list[Tensor]) -> list[list[int]]:
    """Of the dimensions that have any."""
    return [[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in results]


@pytest.mark.parametrize("layout", ["turned", "gaps"])
@pytest.mark.parametrize("name", NAMES)
def test_imitations_of_tensors_have_the_strides_of_real_ones(name, layout, kernels):
    case = cases(torch.bfloat16 if "fp8" in name else F32)[name]
    inputs = [x.detach().bfloat16().requires_grad_() for x in case.inputs] if "fp8" in name else case.inputs
    inputs = [laid_out(x, layout) for x in inputs]

    def run(given):
        found = case.function(*given)
        found = found if isinstance(found, tuple) else (found,)
        shapes = [y.shape for y in found]
        gradients = [laid_out(random(*shape or (1,), grad=False).view(shape), layout) for shape in shapes]
        return outputs_and_gradients(lambda *_: found, given, gradients)

    real = run(inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        imitated = run([mode.from_tensor(x) for x in inputs])
    assert strides(imitated) == strides(real)
    assert [x.dtype for x in imitated] == [x.dtype for x in real]


@pytest.mark.parametrize("layout", ["turned", "gaps"])
def test_what_attention_is_given_is_contiguous(layout, kernels):
    qkv = laid_out(random(2, 6, 8, 16), layout)
    for x in attention_inputs(qkv, 2, *rotary_tables(6, 16, 1e4, qkv.device)):
        assert (x.transpose(1, 2) if kernels == "c" else x).is_contiguous()

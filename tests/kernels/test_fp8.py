import pytest
import torch
from kernel_tools import DEVICE, DTYPES, error, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import fp8 as module
from hotlap.kernels.fp8 import (
    E4M3,
    E5M2,
    check_fp8,
    fp8_pays,
    linear_fp8,
    linear_fp8_ref,
    quantize,
    quantize_ref,
)
from hotlap.kernels.tiles import Tile


@pytest.fixture(params=["torch", "triton"], autouse=True)
def kernels(request, choose_kernels, monkeypatch):
    """Both paths; the Triton one with small blocks, on poisoned memory."""
    monkeypatch.setattr(module, "_quantize_tiles", lambda *_: [Tile({"BLOCK_M": 16, "BLOCK_N": 32})])
    return choose_kernels("torch") if request.param == "torch" else request.getfixturevalue("triton_kernels")


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 16), (5, 100)])
def test_quantising_rounds_as_torch_does_and_transposes(shape, fp8, dtype):
    x = random(*shape, dtype=dtype, grad=False)
    y, transposed, scale = quantize(x, fp8)
    expected, _ = quantize_ref(x, scale, fp8)
    assert torch.equal(bits(y), bits(expected)) and torch.equal(
        bits(transposed), bits(expected.T.contiguous())
    )
    assert y.float().abs().max() == torch.finfo(fp8).max  # the largest value uses the whole range
    assert scale.dtype == torch.float32 and scale.shape == ()


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_values_beyond_the_range_are_bounded(fp8):
    x = torch.tensor([[1e6, -1e6, 1.0, 0.0]], device=DEVICE)
    quantise = module._quantize if module.use_triton(x) else quantize_ref
    y, _ = quantise(x, torch.ones((), device=DEVICE), fp8)
    limit = torch.finfo(fp8).max
    assert y.float().tolist() == [[limit, -limit, 1.0, 0.0]]


def test_zeros_stay_zeros():
    y, transposed, scale = quantize(torch.zeros(16, 32, device=DEVICE), E4M3)
    assert not y.float().any() and not transposed.float().any() and scale == 1


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded"])
def test_strides_do_not_matter(layout):
    x = random(20, 30, grad=False)
    view = {"rows apart": torch.stack((x, x), 1)[:, 0], "transposed": x.T, "expanded": x[:1].expand(20, 30)}[
        layout
    ]
    for a, b in zip(quantize(view, E4M3), quantize(view.contiguous(), E4M3), strict=True):
        assert torch.equal(a.float(), b.float())


def case(M, K, N, dtype=torch.bfloat16):
    x, weight = random(M, K, dtype=dtype), random(N, K)
    return [x, weight], [random(M, N, seed=1, grad=False)]


@pytest.mark.parametrize("shape", [(16, 16, 16), (48, 32, 80), (16, 160, 64)])
def test_output_and_gradients_are_within_the_rounding_of_fp8(shape):
    """e4m3 has 3 bits behind the point and e5m2 has 2: errors of 2.6 and 5 % of a value."""
    inputs, gradients = case(*shape)
    ours = outputs_and_gradients(linear_fp8, inputs, gradients)
    exact = outputs_and_gradients(
        linear_fp8_ref, [x.detach().double().requires_grad_() for x in inputs], gradients
    )
    for one, other, bound in zip(ours, exact, (0.05, 0.08, 0.08), strict=True):
        assert error(one, other) < bound
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_the_products_are_those_of_the_quantised_tensors():
    (x, weight), (dy,) = case(32, 48, 16)
    y, dx, dw = outputs_and_gradients(linear_fp8, [x, weight], [dy])
    (xq, _, xs), (wq, _, ws) = quantize(x.detach(), E4M3), quantize(weight.detach(), E4M3)
    dq, _, ds = quantize(dy.to(x.dtype), E5M2)
    for actual, expected in (
        (y, xq.double() @ wq.double().T / (xs * ws)),
        (dx, dq.double() @ wq.double() / (ds * ws)),
        (dw, dq.double().T @ xq.double() / (ds * xs)),
    ):
        assert error(actual, expected) < 4e-3  # one rounding to bfloat16


def test_batches_keep_their_shape_and_two_runs_agree():
    (x, weight), _ = case(32, 48, 16)
    y = linear_fp8(x.view(2, 16, 48), weight)
    assert y.shape == (2, 16, 16) and torch.equal(y.flatten(0, 1), linear_fp8(x, weight))


def test_compiles_whole_to_the_same_results():
    def function(x, weight):
        return linear_fp8(x, weight) * 2

    inputs, gradients = case(32, 48, 16)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operation_keeps_the_rules_of_torch():
    opcheck(module._quantize_op.op, (random(20, 30, grad=False), torch.ones((), device=DEVICE), E4M3))


def test_sizes_that_do_not_fit_and_devices_without_fp8_are_refused():
    (x, weight), _ = case(32, 48, 16)
    for wrong in ((x[:31], weight), (x, weight[:15]), (x[:, :32], weight)):
        with pytest.raises(ValueError, match="multiples of 16"):
            linear_fp8(*wrong)
    with pytest.raises(ValueError, match="not cpu; use bfloat16"):
        check_fp8(torch.device("cpu"))
    assert fp8_pays(6144, 1536) and not fp8_pays(3072, 768 - 16) and not fp8_pays(6144, 1544)


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ValueError, match=r"A100 has 8\.0"):
        check_fp8(torch.device("cuda"))

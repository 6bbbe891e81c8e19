import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, error, far_rows, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import fp8 as module
from hotlap.kernels.fp8 import (
    E4M3,
    E5M2,
    check_fp8,
    fp8_pays,
    linear_fp8,
    linear_fp8_ref,
    linear_relu2_fp8,
    quantize,
    quantize_ref,
)
from hotlap.kernels.linear_relu2 import linear_relu2_ref
from hotlap.kernels.tiles import Tile


@pytest.fixture(params=["torch", "triton"], autouse=True)
def kernels(request, choose_kernels, monkeypatch):
    """Both paths; the Triton one with small blocks, on poisoned memory."""
    for name in ("_largest_tiles", "_quantize_tiles", "_transpose_tiles"):
        monkeypatch.setattr(module, name, lambda *_: [Tile({"BLOCK_M": 16, "BLOCK_N": 32})])
    return choose_kernels("torch") if request.param == "torch" else request.getfixturevalue("triton_kernels")


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 16), (5, 100), (70, 130)])
def test_quantising_rounds_as_torch_does_and_transposes(shape, fp8, dtype):
    x = random(*shape, dtype=dtype, grad=False)
    for given in ((), (True,), (False, random(*shape, dtype=dtype, grad=False, seed=1))):
        y, transposed, inverse = quantize(x, fp8, *given)
        expected, _, scale = quantize_ref(x, fp8, *given)
        assert torch.equal(bits(y), bits(expected))
        assert torch.equal(bits(transposed), bits(expected.T.contiguous()))
        assert torch.equal(inverse, scale) and scale.dtype == torch.float32 and scale.shape == ()
        if expected.float().any():  # the largest value uses the whole range
            assert y.float().abs().max() == torch.finfo(fp8).max


@pytest.mark.xdist_group("gigabytes")
def test_rows_may_lie_beyond_two_to_the_31():
    far, pre = far_rows(16), far_rows(16)
    for given in ((), (True,), (False, pre)):
        near = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in given]
        for a, b in zip(quantize(far, E4M3, *given), quantize(far.contiguous(), E4M3, *near), strict=True):
            assert torch.equal(a.float(), b.float())


def test_the_reference_quantises_relu2_and_its_gradient():
    x, dy = random(20, 30, grad=False), random(20, 30, grad=False, seed=1)
    leaf = x.clone().requires_grad_()
    a = leaf.relu().square()
    (dx,) = torch.autograd.grad(a, leaf, dy)
    for found, expected in (
        (quantize_ref(x, E4M3, True), a.detach()),
        (quantize_ref(dy, E4M3, False, x), dx),
    ):
        for one, other in zip(found, quantize_ref(expected, E4M3), strict=True):
            torch.testing.assert_close(one.float(), other.float())


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_what_is_not_a_number_or_infinite_is_not_hidden(fp8):
    """A step that went wrong has to end in a loss that shows it, not in the largest fp8 number."""
    for bad in (float("nan"), float("inf")):
        x = torch.tensor([[1.0, bad, -2.0, 0.0]], device=DEVICE)
        y, _, inverse = quantize(x, fp8)
        assert (y.float() * inverse)[0, 1].isnan()
    for given in ((True,), (False, torch.full((1, 4), float("nan"), device=DEVICE))):
        y, _, inverse = quantize(torch.full((1, 4), float("nan"), device=DEVICE), fp8, *given)
        assert (y.float() * inverse).isnan().all()


def test_zeros_stay_zeros_and_tiny_values_do_not_overflow_the_scale():
    for value in (0.0, 1e-38):
        y, transposed, inverse = quantize(torch.full((16, 32), value, device=DEVICE), E4M3)
        assert not y.float().any() and not transposed.float().any() and inverse == 1


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


@pytest.mark.parametrize("shape", [(16, 16, 64), (48, 32, 128)])
def test_an_mlp_and_its_gradients_are_within_the_rounding_of_fp8(shape):
    M, D, N = shape
    x, w_in, w_out = random(M, D, dtype=torch.bfloat16), random(N, D, seed=1), random(D, N, seed=2)
    inputs = [x, *((w / w.shape[1] ** 0.5).detach().requires_grad_() for w in (w_in, w_out))]
    gradients = [random(M, D, seed=3, grad=False)]
    ours = outputs_and_gradients(linear_relu2_fp8, inputs, gradients)
    exact = outputs_and_gradients(
        linear_relu2_ref, [x.detach().double().requires_grad_() for x in inputs], gradients
    )
    for one, other, bound in zip(ours, exact, (0.1, 0.15, 0.15, 0.1), strict=True):
        assert error(one, other) < bound
    assert [x.dtype for x in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2
    layers = outputs_and_gradients(
        lambda x, w_in, w_out: linear_fp8(linear_fp8(x, w_in).relu().square(), w_out), inputs, gradients
    )
    for one, other in zip(ours, layers, strict=True):  # which round the activations to bfloat16 besides
        assert error(one, other.double()) < 0.04
    again = outputs_and_gradients(linear_relu2_fp8, inputs, gradients)
    assert all(map(torch.equal, ours, again))


def test_the_products_are_those_of_the_quantised_tensors():
    (x, weight), (dy,) = case(32, 48, 16)
    y, dx, dw = outputs_and_gradients(linear_fp8, [x, weight], [dy])
    (xq, _, xi), (wq, _, wi) = quantize(x.detach(), E4M3), quantize(weight.detach(), E4M3)
    dq, _, di = quantize(dy.to(x.dtype), E5M2)
    for actual, expected, bound in (
        (y, xq.double() @ wq.double().T * (xi * wi), 4e-3),  # one rounding to bfloat16
        (dx, dq.double() @ wq.double() * (di * wi), 4e-3),
        # tensor cores sum products of fp8 in fewer bits than float32
        (dw, dq.double().T @ xq.double() * (di * xi), 1e-3 if DEVICE.type == "cuda" else 1e-5),
    ):
        assert error(actual, expected) < bound


def test_batches_keep_their_shape_and_two_runs_agree():
    (x, weight), _ = case(32, 48, 16)
    y = linear_fp8(x.view(2, 16, 48), weight)
    assert y.shape == (2, 16, 16) and torch.equal(y.flatten(0, 1), linear_fp8(x, weight))


def test_compiles_whole_to_the_same_results():
    def function(x, w_in, w_out):
        return linear_relu2_fp8(linear_fp8(x, w_out) * 2, w_in, w_in.T)

    inputs = [random(32, 48, dtype=torch.bfloat16), random(64, 16), random(16, 48, seed=1)]
    gradients = [random(32, 16, seed=2, grad=False)]
    torch._dynamo.reset()  # or the first choice of kernels would stay compiled in
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        if DEVICE.type == "cpu":
            torch.testing.assert_close(a, b)
        else:  # a fused pass rounds fewer intermediate values, and some others then to another fp8 number
            assert error(a, b.double()) < 0.03


def test_the_operation_keeps_the_rules_of_torch():
    x = random(20, 30, grad=False)
    opcheck(module._quantize_op.registered(), (x, E4M3, False, None))
    opcheck(module._quantize_op.registered(), (x, E5M2, False, random(20, 30, grad=False, seed=1)))


def test_sizes_that_do_not_fit_and_devices_without_fp8_are_refused():
    (x, weight), _ = case(32, 48, 16)
    for wrong in ((x[:31], weight), (x, weight[:15]), (x[:, :32], weight)):
        with pytest.raises(ValueError, match="multiples of 16"):
            linear_fp8(*wrong)
    for wrong in ((x[:31], weight, weight.T), (x, weight, weight), (x, weight[:15], weight[:15].T)):
        with pytest.raises(ValueError, match="multiples of 16"):
            linear_relu2_fp8(*wrong)
    with pytest.raises(ValueError, match="not cpu; use bfloat16"):
        check_fp8(torch.device("cpu"))
    assert fp8_pays(6144, 1536) and fp8_pays(1536, 1536) and not fp8_pays(6144, 1544)
    assert not fp8_pays(3072, 768) and not fp8_pays(1 << 20, 512)


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ValueError, match=r"A100 has 8\.0"):
        check_fp8(torch.device("cuda"))

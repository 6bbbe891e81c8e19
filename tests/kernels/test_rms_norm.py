import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, check, chosen, far_rows, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import rms_norm as module
from hotlap.kernels.rms_norm import rms_norm, rms_norm_ref, rms_norm_residual, rms_norm_residual_ref

pytestmark = pytest.mark.usefixtures("triton_or_c")

WIDTHS = [1, 63, 97, 200, 257, 1025]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_is_as_exact_as_torch(width, dtype):
    for rows, weight in ((19, None), (19, random(width, dtype=dtype, seed=1)), (1, random(width, seed=1))):
        x, dy = random(rows, width, dtype=dtype), random(rows, width, seed=2, grad=False)
        scale = (
            1.0 if width == 1 else 1e-30
        )  # the gradient of one element over its own size is all cancellation
        check(rms_norm, rms_norm_ref, (x, weight), [dy], scale)


@pytest.mark.parametrize("width", [8192, 8200, 16384, 16400])
@pytest.mark.parametrize("weighted", [False, True])
def test_wide_rows_are_as_exact_as_torch(width, weighted):
    x, dy = random(1, 3, width, dtype=torch.bfloat16), random(1, 3, width, seed=2, grad=False)
    weight = random(width, seed=1) if weighted else None
    check(rms_norm, rms_norm_ref, (x, weight), [dy])
    residual = random(1, 3, width, dtype=torch.bfloat16, seed=3)
    check(rms_norm_residual, rms_norm_residual_ref, (x, residual, weight), [dy, dy])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_residual_add_is_as_exact_as_torch_and_the_rounded_sum_is_normalised(weighted, dtype):
    x, residual = random(2, 5, 200, dtype=dtype), random(2, 5, 200, dtype=dtype, seed=1)
    weight = random(200, dtype=dtype, seed=3) if weighted else None
    gradients = [random(2, 5, 200, seed=seed, grad=False) for seed in (4, 5)]
    check(rms_norm_residual, rms_norm_residual_ref, (x, residual, weight), gradients)
    y, total = rms_norm_residual(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "weighted"), [(1, False), (97, False), (200, True), (8200, False)])
def test_a_scaled_residual_is_as_exact_as_torch(width, weighted, dtype):
    x, residual = random(2, 5, width, dtype=dtype), random(2, 5, width, dtype=dtype, seed=1)
    scales = random(1, dtype=dtype)[0] + 1, random(1, dtype=dtype, seed=1)[0]
    scales = [scale.detach().requires_grad_() for scale in scales]
    weight = random(width, dtype=dtype, seed=3) if weighted else None
    gradients = [random(2, 5, width, seed=seed, grad=False) for seed in (4, 5)]

    def scaled(function):
        return lambda x, residual, weight, a, b: function(x, residual, weight, scales=(a, b))

    inputs = (x, residual, weight, *scales)
    # the last two are sums of this many numbers, which may cancel
    least = [1e-30] * (4 + weighted) + [x.numel() ** 0.5] * 2
    check(scaled(rms_norm_residual), scaled(rms_norm_residual_ref), inputs, gradients, least)
    y, total = scaled(rms_norm_residual)(*inputs)
    assert torch.equal(y, rms_norm(total, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_scales", [torch.float32, torch.bfloat16])
def test_scales_may_have_another_dtype_than_the_rows(of_scales, dtype):
    x, residual = random(3, 50, dtype=dtype, grad=False), random(3, 50, dtype=dtype, grad=False, seed=1)
    scales = [torch.tensor(value, dtype=of_scales, device=DEVICE).requires_grad_() for value in (0.75, -1.5)]
    y, total = rms_norm_residual(x, residual, scales=tuple(scales))
    wanted, sums = rms_norm_residual_ref(x, residual, scales=tuple(scales))
    tolerances = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close((y, total), (wanted, sums), **tolerances)
    upstream = random(3, 50, dtype=dtype, grad=False, seed=2)
    ours = torch.autograd.grad((y, total), scales, (upstream, upstream))
    theirs = torch.autograd.grad((wanted, sums), scales, (upstream, upstream))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 if of_scales == dtype else 0.3)


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_of_the_scaled_residual_add_has_no_gradient(used):
    inputs = random(4, 63), random(4, 63, seed=1), *(random(2, seed=2).unbind())
    inputs, g = [x.detach().requires_grad_() for x in inputs], random(4, 63, seed=3, grad=False)

    def one(function):
        return lambda x, residual, a, b: function(x, residual, scales=(a, b))[used]

    check(one(rms_norm_residual), one(rms_norm_residual_ref), inputs, [g])


def test_the_residual_add_with_scales_of_one_is_the_one_without():
    x, residual, one = random(3, 50), random(3, 50, seed=1), torch.ones(()).to(DEVICE)
    gradients = [random(3, 50, seed=seed, grad=False) for seed in (2, 3)]
    plain = outputs_and_gradients(rms_norm_residual, (x, residual), gradients)
    scaled = outputs_and_gradients(
        lambda x, residual: rms_norm_residual(x, residual, scales=(one, one)), (x, residual), gradients
    )
    assert all(map(torch.equal, plain, scaled))


def test_an_unused_output_of_the_residual_add_has_no_gradient():
    x, residual, g = random(4, 63), random(4, 63, seed=1), random(4, 63, seed=2, grad=False)
    for used in (0, 1):
        ours = torch.autograd.grad(rms_norm_residual(x, residual)[used], (x, residual), g)
        want = torch.autograd.grad(rms_norm_residual_ref(x, residual)[used], (x, residual), g)
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded", "one dimension"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "rows apart":
            return x[:, 3:100]
        if layout == "one dimension":
            return x[0]
        return x.T if layout == "transposed" else x[:1].expand(7, 128)

    x, dy = view(random(9, 128)), view(random(9, 128, seed=1, grad=False))
    weight = random(x.shape[-1], seed=2)
    x = x.detach().requires_grad_()
    check(rms_norm, rms_norm_ref, (x, weight), [dy])
    check(rms_norm_residual, rms_norm_residual_ref, (x, x.detach(), weight), [dy, dy])
    rms_norm(x, weight).sum().backward()  # a gradient of stride 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_gives_nothing(shape):
    x, weight = random(*shape), random(shape[-1])
    scales = random(2).unbind()
    y, total = rms_norm_residual(x, x, weight, scales=scales)
    assert y.shape == total.shape == rms_norm(x, weight).shape == x.shape
    (y + total).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize("width", [64, 32768])
def test_rows_may_lie_beyond_two_to_the_31(width):
    x, dy = far_rows(width).requires_grad_(), far_rows(width)
    weight = random(width)
    ours = outputs_and_gradients(rms_norm, (x, weight), [dy])
    near = x.detach().contiguous().requires_grad_()
    for a, b in zip(ours, outputs_and_gradients(rms_norm, (near, weight), [dy.contiguous()]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.xdist_group("gigabytes")
def test_rows_of_residuals_may_lie_beyond_two_to_the_31():
    far = [far_rows(64).requires_grad_() for _ in range(2)]
    scales = [torch.tensor(value, device=DEVICE, requires_grad=True) for value in (0.7, 0.3)]
    gradients = [far_rows(64), far_rows(64)]
    near = [x.detach().contiguous().requires_grad_() for x in far]
    for added in ((), scales):
        ours, wanted = (
            outputs_and_gradients(
                lambda x, y, *ab: rms_norm_residual(x, y, None, 1e-6, ab or None), (*rows, *added), g
            )
            for rows, g in ((far, gradients), (near, [g.contiguous() for g in gradients]))
        )
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b)


def test_two_runs_agree_bit_for_bit():
    x, weight, dy = random(50, 300), random(300, seed=1), random(50, 300, seed=2, grad=False)

    def scaled(a, b):
        return rms_norm_residual(x, dy, scales=(a, b))

    scales = [scale.detach().requires_grad_() for scale in random(2)]
    first, second = (outputs_and_gradients(scaled, scales, [dy, dy]) for _ in range(2))
    assert all(map(torch.equal, first, second))
    first, second = (outputs_and_gradients(rms_norm, (x, weight), [dy]) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    x, weight = random(3, 40), random(40)
    if chosen(module._rms_norm) is not module._rms_norm.registered():
        weight = None  # those in C take none
    opcheck(chosen(module._rms_norm), (x, weight, 1e-6))
    opcheck(chosen(module._rms_norm), (x, None, 1e-6))
    residual, scales = random(3, 40, seed=1), [scale.detach().requires_grad_() for scale in random(2)]
    opcheck(chosen(module._rms_norm_residual), (x, residual, None, None, weight, 1e-6))
    opcheck(chosen(module._rms_norm_residual), (x, residual, *scales, weight, 1e-6))
    x, residual, *scales = (t.detach() for t in (x, residual, *scales))
    weight = None if weight is None else weight.detach()
    rstd = torch.ones(3).to(x.device)
    opcheck(chosen(module._rms_norm_backward), (x, None, x, None, None, None, weight, rstd))
    opcheck(chosen(module._rms_norm_backward), (x, x, x, residual, *scales, None, rstd))


def test_compiles_whole_to_the_same_results():
    def function(x, residual, weight, a, b):
        y, total = rms_norm_residual(x, residual, weight)
        y, total = rms_norm_residual(y.cos(), total, scales=(a, b))
        return rms_norm(y.sin()) + total

    scales = [scale.detach().requires_grad_() for scale in random(2)]
    inputs = random(5, 33), random(5, 33, seed=1), random(33), *scales
    dy = random(5, 33, seed=2, grad=False)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, [dy])
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(random(2, 8), random(4))
    with pytest.raises(ValueError, match="residual is"):
        rms_norm_residual(random(2, 8), random(2, 8).bfloat16())
    with pytest.raises(ValueError, match="scales are"):
        rms_norm_residual(random(2, 8), random(2, 8), scales=(random(1), random(1)))

"""The fused products of decoding are the products, norms, mixes and residuals that they replace."""

import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, SMALLEST_ERROR, as_double, error, far_apart, random
from torch.library import opcheck

from hotlap.kernels import decode_linear as module
from hotlap.kernels import decode_linear_kernels as kernels
from hotlap.kernels.decode_linear import linear_residual, linear_residual_ref, norm_linear, norm_linear_ref
from hotlap.kernels.dispatch import INTERPRETED, Device
from hotlap.kernels.tiles import fitting_tiles

pytestmark = pytest.mark.usefixtures("triton_kernels")

SHAPES = [(1, 16, 40), (1, 97, 33), (2, 200, 7), (5, 333, 70), (16, 64, 96)]  # R, D, N
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a number to the nearest, as a share of it
FUSED = DTYPES if INTERPRETED else DTYPES[1:]  # on a GPU, float32 has no tensor cores


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that these sizes fill several times over, in both directions."""
    patched = lambda rows, _: kernels._tiles([(16, 16, 2, 2)], rows)  # noqa: E731
    patched.__name__ = "small"
    monkeypatch.setattr(module, "_table", lambda *_: patched)


@pytest.fixture
def only_kernel(monkeypatch):
    """Nothing is computed by the reference."""
    for name in ("norm_linear_ref", "linear_residual_ref"):
        monkeypatch.setattr(module, name, None)


def case(R, D, N, dtype=torch.float16):
    """x, x0, residual and weight, such that products are of size 1; and the scales of a mix."""
    x, x0 = (random(R, D, dtype=dtype, grad=False, seed=seed) for seed in (0, 1))
    weight = (random(N, D, grad=False, seed=2) / D**0.5).to(dtype)
    residual = random(R, N, dtype=dtype, grad=False, seed=3)
    scales = (torch.tensor(value, device=DEVICE) for value in (1.15, 0.2))
    return x, x0, residual, weight, *(scale.to(dtype) for scale in scales)


def is_as_exact_as(function, reference, *inputs):
    """Each output is at most twice as far from float64 as that of the reference in the dtype."""
    exact = reference(*(tuple(map(as_double, x)) if isinstance(x, tuple) else as_double(x) for x in inputs))
    results = [function(*inputs), reference(*inputs), exact]
    for ours, torchs, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in results), strict=True):
        if exact is None:
            assert ours is torchs is None
            continue
        assert ours.dtype == torchs.dtype
        assert error(ours, exact) <= 2 * error(torchs, exact) + SMALLEST_ERROR


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_is_as_exact_as_torch(shape, dtype, only_kernel):
    x, x0, residual, weight, a, b = case(*shape, dtype)
    gate = random(3, min(12, shape[1]), dtype=dtype, grad=False, seed=4)
    for form in ((None, None, True), ((a, b, x0),), ((a, b, x0), gate), (None, gate)):
        is_as_exact_as(norm_linear, norm_linear_ref, x, weight, *form)
    is_as_exact_as(linear_residual, linear_residual_ref, x, weight, residual)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_norm_differs_from_the_reference_by_the_rounding_that_it_leaves_out(dtype):
    """That of each normalised element, and of both results; and what a float32 sum rounds."""
    x, _, _, weight, _, _ = case(16, 333, 70, dtype)
    y, expected = norm_linear(x, weight)[0], norm_linear_ref(x, weight)[0]
    normalised = module.rms_norm_ref(x.double())
    most = normalised.abs() @ weight.double().abs().T + 2 * expected.double().abs()
    most = ROUNDING[dtype] * most + 2**-19
    assert ((y.double() - expected.double()).abs() <= most).all()
    assert not torch.equal(y, expected)


def test_the_sum_is_rounded_before_it_is_normalised():
    x, x0, _, weight, a, b = case(3, 100, 40, torch.bfloat16)
    y, total, _ = norm_linear(x, weight, (a, b, x0))
    assert torch.equal(total, (a.float() * x.float() + b.float() * x0.float()).bfloat16())
    assert torch.equal(y, norm_linear(total, weight)[0])


def test_scales_of_float32_are_rounded_to_the_dtype_of_x():
    x, x0, _, weight, _, _ = case(3, 100, 40, torch.bfloat16)
    a, b = (torch.tensor([value], device=DEVICE) for value in (1.234567, 0.2345678))
    rounded = norm_linear(x, weight, (a[0].bfloat16(), b[0].bfloat16(), x0))
    for one, other in zip(norm_linear(x, weight, (a[0], b[0], x0))[:2], rounded, strict=False):
        assert torch.equal(one, other)


def test_without_a_mix_the_sum_is_x_itself():
    x, _, _, weight, _, _ = case(3, 100, 40)
    assert norm_linear(x, weight)[1] is x


@pytest.mark.parametrize("layout", ["rows apart", "elements apart", "expanded", "batches"])
def test_strides_do_not_matter(layout, only_kernel):
    def view(x):
        if layout == "batches":
            return x if x.shape[0] == 40 else x.view(2, 2, -1)
        if layout == "expanded":
            return x[:1].expand(x.shape)
        apart = torch.stack((x, torch.full_like(x, float("nan"))), 1 if layout == "rows apart" else -1)
        return apart.select(1 if layout == "rows apart" else -1, 0)

    x, x0, residual, weight, a, b = (t if t.dim() == 0 else view(t) for t in case(4, 100, 40))
    gate = weight[..., :12].reshape(-1, 12)[::5]  # rows apart
    is_as_exact_as(norm_linear, norm_linear_ref, x, weight, (a, b, x0), gate)
    is_as_exact_as(linear_residual, linear_residual_ref, x, weight, residual)


@pytest.mark.xdist_group("gigabytes")
def test_rows_of_the_weight_may_lie_beyond_two_to_the_31(only_kernel):
    x, _, residual, weight, _, _ = case(1, 40, 3, torch.float16)
    assert torch.equal(linear_residual(x, far_apart(weight), residual), linear_residual(x, weight, residual))


def test_one_row_and_rows_in_a_batch_agree():
    x, _, residual, weight, _, _ = case(16, 333, 70)
    together = linear_residual(x, weight, residual)
    alone = torch.cat([linear_residual(x[i : i + 1], weight, residual[i : i + 1]) for i in range(16)])
    torch.testing.assert_close(alone, together)


def test_what_is_not_a_number_stays_in_its_row():
    x, _, _, weight, _, _ = case(4, 40, 33)
    x[1, 3] = float("nan")
    y, *_ = norm_linear(x, weight, squared_relu=True)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


def test_a_row_of_zeros_gives_zeros():
    x, _, _, weight, _, _ = case(2, 40, 33)
    assert not norm_linear(torch.zeros_like(x), weight)[0].any()


def test_no_rows_give_no_rows():
    x, x0, residual, weight, a, b = case(2, 40, 33)
    y, total, gates = norm_linear(x[:0], weight, (a, b, x0[:0]), weight[:4, :8])
    assert y.shape == (0, 33) and total.shape == (0, 40) and gates.shape == (0, 4)
    assert linear_residual(x[:0], weight, residual[:0]).shape == (0, 33)


@pytest.mark.parametrize("reason", ["gradient", "gradient of a scale", "rows", "dtype"])
def test_what_the_kernel_does_not_take_is_the_reference(reason, monkeypatch):
    monkeypatch.setattr(module, "_decode_linear", None)
    x, x0, residual, weight, a, b = case(17 if reason == "rows" else 3, 40, 33, torch.bfloat16)
    if reason == "dtype":
        weight = weight.float()
    if reason == "gradient":
        weight.requires_grad_()
    if reason == "gradient of a scale":
        a.requires_grad_()
    y, *_ = norm_linear(x, weight, (a, b, x0))
    assert torch.equal(y, norm_linear_ref(x, weight, (a, b, x0))[0])
    assert y.requires_grad == reason.startswith("gradient")
    if reason != "gradient of a scale":
        assert torch.equal(linear_residual(x, weight, residual), linear_residual_ref(x, weight, residual))


def test_a_weight_that_learns_is_fused_where_no_gradient_is_taken(only_kernel):
    x, _, residual, weight, _, _ = case(3, 40, 33)
    with torch.no_grad():
        linear_residual(x, weight.requires_grad_(), residual)


def test_the_operation_keeps_the_rules_of_torch():
    x, x0, residual, weight, a, b = case(3, 40, 33)
    opcheck(
        module._decode_linear.registered(),
        (x, weight, None, a, b, x0, weight[:4, :8].clone(), None, True, True),
    )
    opcheck(module._decode_linear.registered(), (x, weight, *[None] * 5, residual, False, False))


def test_compiles_whole_to_the_same_results():
    def function(x, x0, residual, weight, a, b):
        y, total, gates = norm_linear(x.sin(), weight, (a, b, x0), weight[:4, :8])
        return linear_residual(total, weight, residual) + y, gates

    inputs = case(3, 40, 33)
    compiled = torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, function(*inputs))


def test_programs_have_small_blocks_where_the_weight_has_few_rows():
    gpu = Device("A GPU", 232448, 132)
    narrow, wide = kernels._decode_linear_narrow_tiles, kernels._decode_linear_wide_tiles
    for rows in (1, 16):
        for N, table in ((1536, narrow), (6144, wide)):
            block = fitting_tiles(table, rows, gpu)[0].blocks["BLOCK_N"]
            assert N / block > gpu.processors  # each has a program


def test_the_form_that_starts_early_comes_last_and_only_where_gpus_can_do_so():
    for table in (kernels._decode_linear_narrow_tiles, kernels._decode_linear_wide_tiles):
        for rows in (1, 16):
            for compute, warp in ((80, 32), (89, 32), (90, 32), (120, 32), (0, 64)):
                gpu = Device("A GPU", 232448, 132, warp, compute=compute)
                early = [bool(tile.kernel) for tile in fitting_tiles(table, rows, gpu)]
                assert early == sorted(early) and any(early) == (compute >= 90)


def test_wrong_shapes_are_named():
    x, x0, residual, weight, a, b = case(3, 40, 33)
    for call, match in (
        (lambda: norm_linear(x[:, :39], weight), r"x is \(3, 39\) and weight \(33, 40\)"),
        (lambda: norm_linear(x, weight, (a, b, x0[:2])), r"x0 is \(2, 40\)"),
        (lambda: norm_linear(x, weight, (a, b, x0.float())), "float32"),
        (lambda: norm_linear(x, weight, None, weight.T[:, :33].repeat(1, 2)), r"gate is \(40, 66\)"),
        (lambda: linear_residual(x, weight, residual[:, :5]), r"residual is \(3, 5\)"),
        (lambda: linear_residual(x, weight, residual.float()), "float32"),
    ):
        with pytest.raises(ValueError, match=match):
            call()

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_tools import (
    DEVICE,
    DTYPES,
    as_double,
    check,
    error,
    far_apart,
    launches_of,
    outputs_and_gradients,
    random,
)
from torch.library import opcheck

from hotlap.bench import tune
from hotlap.kernels import linear_relu2 as module
from hotlap.kernels import tiles
from hotlap.kernels.dispatch import Device
from hotlap.kernels.linear_relu2 import linear_relu2, linear_relu2_ref
from hotlap.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")

PLAIN = Tile({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2})
TMA = dataclasses.replace(PLAIN, kernel="_linear_relu2_tma_kernel")
APART = Tile({"BLOCK": 64}, kernel="_linear_relu2_apart_kernel")
TABLE = module._linear_relu2_tiles


@pytest.fixture
def choose(monkeypatch):
    """A function that makes one of three small tiles the chosen one."""

    def choose(tile: Tile) -> None:
        monkeypatch.setattr(module, "_linear_relu2_tiles", lambda *_: [PLAIN, TMA, APART])
        monkeypatch.setattr(module, "pick_tile", lambda *_: tile)

    return choose


@pytest.fixture(autouse=True, params=[PLAIN, TMA, APART], ids=["plain", "tma", "apart"])
def form(request, choose):
    choose(request.param)


once = pytest.mark.parametrize("form", [PLAIN], ids=[""], indirect=True)  # of what chooses the form itself


@pytest.fixture
def launches(monkeypatch):
    return launches_of(module, monkeypatch)


def case(M, D, N, dtype=torch.float32):
    """Inputs whose activations are of size 1, and a gradient."""
    x, w_in, w_out = (
        random(M, D, dtype=dtype),
        random(N, D, dtype=dtype, seed=1),
        random(D, N, dtype=dtype, seed=2),
    )
    weights = [(w / w.shape[1] ** 0.5).detach().requires_grad_() for w in (w_in, w_out)]
    return [x, *weights], [random(M, D, seed=3, grad=False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 20, 30), (33, 16, 64), (70, 40, 90), (128, 32, 128), (17, 65, 31), (49, 72, 88)]
)
def test_is_as_exact_as_torch(shape, dtype):
    inputs, gradients = case(*shape, dtype)
    check(linear_relu2, linear_relu2_ref, inputs, gradients, scale=1e-2)


def test_the_reference_is_what_it_says():
    (x, w_in, w_out), _ = case(5, 8, 32)
    expected = torch.stack([w_out @ F.relu(w_in @ row).square() for row in x])
    torch.testing.assert_close(linear_relu2_ref(x, w_in, w_out), expected)
    torch.testing.assert_close(linear_relu2(x, w_in, w_out), expected)


def test_float32_weights_get_float32_gradients():
    (x, w_in, w_out), (dy,) = case(20, 16, 64, torch.bfloat16)
    masters = [w.detach().float().requires_grad_() for w in (w_in, w_out)]
    y, dx, *dw = outputs_and_gradients(linear_relu2, [x, *masters], [dy])
    assert y.dtype == dx.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in dw)
    rounded = outputs_and_gradients(linear_relu2, [x, w_in, w_out], [dy])
    for one, other in zip((y, dx, *dw), rounded, strict=True):
        torch.testing.assert_close(one.float(), other.float())


@pytest.mark.parametrize("layout", ["rows apart", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "expanded":
            return x[:1].expand(x.shape)
        return torch.stack((x, x), -1 if layout == "channels apart" else 1).select(
            -1 if layout[0] == "c" else 1, 0
        )

    inputs, gradients = case(20, 24, 40)
    check(
        linear_relu2,
        linear_relu2_ref,
        [view(x).detach().requires_grad_() for x in inputs],
        [view(g) for g in gradients],
        scale=1e-2,
    )
    linear_relu2(*inputs).sum().backward()  # a gradient of stride 0


@once
@pytest.mark.parametrize("size", [1.0, 2**-7, 2**-11])
def test_float16_gradients_of_small_activations_keep_their_digits(size):
    """The square of a small activation has few digits in float16, or none; its gradient is of its size."""
    (x, w_in, w_out), (dy,) = case(20, 24, 40)
    inputs = [(t.detach() * scale).half().requires_grad_() for t, scale in ((x, size), (w_in, 1), (w_out, 1))]
    exact = outputs_and_gradients(linear_relu2_ref, [as_double(t) for t in inputs], [dy.double()])
    ours = outputs_and_gradients(linear_relu2, inputs, [dy])
    for which in (1, 2):  # of x, whose size is that of the activations, and of w_in, whose size is its square
        if exact[which].abs().max() > 2**-14:  # float16's smallest with all its digits
            assert error(ours[which], exact[which]) < 2**-8


def test_batches_keep_their_shape_and_nothing_gives_nothing():
    (x, w_in, w_out), (dy,) = case(12, 16, 64)
    y = linear_relu2(x.view(2, 6, 16), w_in, w_out)
    assert torch.equal(y.flatten(0, 1), linear_relu2(x, w_in, w_out))
    check(linear_relu2, linear_relu2_ref, [x[:0], w_in, w_out], [dy[:0]])


@pytest.mark.xdist_group("gigabytes")
def test_rows_may_lie_beyond_two_to_the_31():
    (x, w_in, w_out), (dy,) = case(3, 16, 3, torch.bfloat16)
    dy = dy.bfloat16()
    ours = outputs_and_gradients(
        linear_relu2, [far_apart(t).requires_grad_() for t in (x, w_in)] + [w_out], [far_apart(dy)]
    )
    for a, b in zip(ours, outputs_and_gradients(linear_relu2, (x, w_in, w_out), [dy]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize("rows, apart", [(3, 2**30), (17, 2**27)])  # in a block of the depth, and in two
def test_rows_of_the_second_weight_may_lie_beyond_two_to_the_31(rows, apart):
    inputs, (dy,) = case(5, rows, 8, torch.bfloat16)
    far = torch.empty_strided((rows, 8), (apart, 1), dtype=torch.bfloat16, device=DEVICE)
    given = [*inputs[:2], far.copy_(inputs[2].detach()).requires_grad_()]
    for a, b in zip(*(outputs_and_gradients(linear_relu2, x, [dy]) for x in (given, inputs)), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_a_number_is_not_hidden():
    (x, w_in, w_out), _ = case(4, 16, 32)
    x.data[1, 3] = float("nan")
    y = linear_relu2(x, w_in, w_out)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(50, 40, 90, torch.bfloat16)
    first, second = (outputs_and_gradients(linear_relu2, inputs, gradients) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    (x, w_in, w_out), (dy,) = case(10, 16, 32)
    opcheck(module._linear_relu2.registered(), (x, w_in, w_out))
    a = torch.rand(10, 32, device=DEVICE)
    opcheck(module._linear_relu2_backward.registered(), (dy, x.detach(), w_in.detach(), w_out.detach(), a))


def test_compiles_whole_to_the_same_results():
    def function(x, w_in, w_out):
        return linear_relu2(x.sin(), w_in, w_out) * 2

    inputs, gradients = case(10, 16, 32)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_wide_layers_are_not_fused(monkeypatch):
    (x, w_in, w_out), _ = case(10, 32, 64)
    monkeypatch.setattr(module, "FUSED_WIDTH", 31)
    monkeypatch.setattr(module, "_product", None)
    torch.testing.assert_close(linear_relu2(x, w_in, w_out), linear_relu2_ref(x, w_in, w_out))


@once
def test_a_few_rows_are_fused_only_for_their_gradients(launches):
    """Decoding reads the weights, which a few tiles cannot do at full bandwidth."""
    (x, w_in, w_out), _ = case(64, 16, 32, torch.bfloat16)  # a GPU never fuses float32
    used = []
    for rows, grad in ((63, True), (63, False), (64, False)):
        launches.clear()
        with torch.set_grad_enabled(grad):
            y = linear_relu2(x[:rows].view(1, rows, 16), w_in, w_out)
        used.append(bool(launches))
        torch.testing.assert_close(y[0], linear_relu2_ref(x[:rows], w_in, w_out), rtol=2e-2, atol=2e-2)
    launches.clear()
    linear_relu2(x[:3].detach(), w_in.detach(), w_out.detach())
    assert [*used, bool(launches)] == [True, False, True, False]


def test_wrong_shapes_are_named():
    (x, w_in, w_out), _ = case(4, 8, 16)
    with pytest.raises(ValueError, match=r"w_in \(16, 7\)"):
        linear_relu2(x, w_in[:, :7], w_out)
    with pytest.raises(ValueError, match=r"w_out \(8, 15\)"):
        linear_relu2(x, w_in, w_out[:, :15])


@once
@pytest.mark.parametrize("dtype", DTYPES[:2] if DEVICE.type == "cpu" else DTYPES[1:2])  # that are fused
def test_both_forms_agree_and_programs_go_on_until_all_tiles_are_done(choose, launches, dtype):
    inputs, gradients = case(70, 40, 88, dtype)
    plain = outputs_and_gradients(linear_relu2, inputs, gradients)
    choose(TMA)
    for a, b in zip(outputs_and_gradients(linear_relu2, inputs, gradients), plain, strict=True):
        assert torch.equal(a, b) if DEVICE.type == "cpu" else error(a, b.double()) < 5e-3
    programs = min(module.device_facts(DEVICE).processors, 18)
    assert launches == [("_linear_relu2_kernel", 18)] * 2 + [(TMA.kernel, programs)] * 2


@once
def test_descriptors_end_where_the_matrix_does_and_not_where_memory_does(choose, launches):
    inputs, (dy,) = case(33, 24, 40, torch.bfloat16)
    expected = outputs_and_gradients(linear_relu2, inputs, [dy])
    launches.clear()
    choose(TMA)
    wide = [F.pad(t.detach(), (0, 8, 0, 8), value=float("nan")) for t in (*inputs, dy.bfloat16())]
    *views, dy = (w[: w.shape[0] - 8, : w.shape[1] - 8] for w in wide)
    results = outputs_and_gradients(linear_relu2, [x.requires_grad_() for x in views], [dy])
    assert [name for name, _ in launches] == [TMA.kernel] * 2
    for a, b in zip(results, expected, strict=True):
        assert error(a, b.double()) < 1e-3


@once
def test_tma_takes_rows_that_are_contiguous_apart_and_aligned():
    def rows(offset, width, apart, count=4):
        return torch.zeros(200, dtype=torch.bfloat16).as_strided((count, width), (apart, 1), offset)

    for right in (rows(0, 24, 24), rows(8, 20, 24), rows(0, 8, 8, count=1)):
        assert module._tma_takes(right, right)
    for wrong in (rows(4, 24, 24), rows(0, 20, 20), rows(0, 24, 0), rows(0, 24, 16), rows(0, 0, 24)):
        assert not module._tma_takes(wrong) and not module._tma_takes(right, wrong)
    assert not module._tma_takes(rows(0, 24, 24).T)


@once
@pytest.mark.parametrize("which", ["x", "w_in", "w_out", "dy", "N"])
def test_operands_that_tma_cannot_take_go_to_the_plain_form(choose, launches, which):
    def odd(x):
        return F.pad(x.detach(), (0, 1))[:, :-1].requires_grad_(x.requires_grad)

    inputs, (dy,) = case(20, 24, 36 if which == "N" else 40, torch.bfloat16)
    given = dict(zip(("x", "w_in", "w_out", "dy"), (*inputs, dy.bfloat16()), strict=True))
    given |= {which: odd(given[which])} if which != "N" else {}
    *inputs, dy = given.values()
    choose(TMA)
    check(linear_relu2, linear_relu2_ref, inputs, [dy], scale=1e-2)
    used = [name == TMA.kernel for name, _ in launches]
    assert used == [which in ("w_out", "dy"), which in ("x", "w_in")]


@once
@pytest.mark.parametrize("shared_memory", [101376, 232448])
@pytest.mark.parametrize("backward", [0, 1])
def test_tma_is_offered_to_devices_that_have_it_and_comes_first_on_hopper_alone(shared_memory, backward):
    device = Device("A GPU", shared_memory, 4)
    plain, all_ = (tiles.fitting_tiles(TABLE, backward, d) for d in (device, device._replace(tma=True)))
    assert TABLE(backward, device._replace(tma=True, compute=90))[0].kernel == TMA.kernel
    forms = [[tile.kernel for tile in some] for some in (plain, all_)]
    assert set(forms[0]) == {"", APART.kernel} and set(forms[1]) == {"", TMA.kernel, APART.kernel}
    for some in forms:
        assert some == sorted(some, key=["", TMA.kernel, APART.kernel].index)


@once
@pytest.mark.skipif(DEVICE.type != "cpu", reason="pretends to be another GPU")
def test_what_tune_has_measured_decides_between_the_forms(monkeypatch, cache, launches):
    device = Device("A GPU", 232448, 4, tma=True)
    for name, value in {"device_facts": lambda _: device, "_linear_relu2_tiles": TABLE}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "pick_tile", tiles.pick_tile)
    monkeypatch.setattr(tune, "device_facts", lambda _: device)
    inputs, gradients = case(16, 24, 40, torch.bfloat16)

    def step():
        launches.clear()
        outputs_and_gradients(linear_relu2, inputs, gradients)
        return [name for name, _ in launches]

    assert step() == ["_linear_relu2_kernel"] * 2
    times = {"_linear_relu2_kernel": 2.0, TMA.kernel: 1.0, APART.kernel: 1.5}
    found = {}
    for i, case_ in enumerate(module.cases(torch.bfloat16)):

        def milliseconds(variants, *_, i=i):
            taken = {}
            for name, call in variants.items():
                call(0)
                taken[name] = times[launches[i][0]]
            return taken

        monkeypatch.setattr(tune, "milliseconds", milliseconds)
        small = dataclasses.replace(case_, run=lambda _: step)
        measured = tune.measure_tiles(small, 1, DEVICE)
        assert sorted(set(measured.values())) == [1.0, 1.5, 2.0]
        tile = tune.fastest(tiles.fitting_tiles(TABLE, i, device), measured)
        found[tiles.tile_key(TABLE, i)] = tile
    assert step() == ["_linear_relu2_kernel"] * 2
    tiles.write_tuned(device.name, found, {})
    assert step() == [TMA.kernel] * 2

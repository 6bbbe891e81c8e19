"""The symmetric product, and the polynomials on it, also in the Gram form, on spectra that are hard for
it.
"""

import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, error, launches_of, random
from torch.library import opcheck

from hotlap.kernels import orthogonalize as module
from hotlap.kernels import tiles
from hotlap.kernels.dispatch import Device
from hotlap.kernels.orthogonalize import POLAR_EXPRESS, SAFETY, orthogonalize
from hotlap.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


PLAIN = Tile({"TILE": 32, "DEPTH": 32})
TMA, WIDE = (
    Tile({"TILE": 32, "WIDTH": width, "DEPTH": 32}, kernel="_symmetric_tma_kernel") for width in (32, 64)
)


@pytest.fixture
def choose(monkeypatch):
    """A function that makes one of three small tiles the chosen one."""

    def choose(tile: Tile) -> None:
        monkeypatch.setattr(module, "_symmetric_tiles", lambda *_: [PLAIN, TMA, WIDE])
        monkeypatch.setattr(module, "pick_tile", lambda *_: tile)

    return choose


@pytest.fixture(autouse=True, params=[PLAIN], ids=[""])
def form(request, choose):
    choose(request.param)


each_form = pytest.mark.parametrize("form", [PLAIN, TMA, WIDE], ids=["plain", "tma", "wide"], indirect=True)


@pytest.fixture
def launches(monkeypatch):
    return launches_of(module, monkeypatch)


def matrix_of(values, M, N, dtype=torch.bfloat16, polynomials=POLAR_EXPRESS):
    """A random matrix (M, N) of these singular values, and the polynomials of it without rounding."""
    generator = torch.Generator().manual_seed(M + N)
    n = min(M, N)
    u, v = (torch.linalg.qr(torch.randn(size, n, generator=generator).double())[0] for size in (M, N))
    x = (u * values.double() @ v.T).to(dtype)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (SAFETY * (s.norm() + 1e-6))
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return x.to(DEVICE), (u * s @ v).to(DEVICE)


SHAPES = [(64, 64), (33, 70), (129, 64), (32, 128), (20, 160), (150, 17), (1, 40), (40, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M, N", SHAPES)
def test_is_polar_express_at_every_aspect(M, N, dtype):
    x, exact = matrix_of(torch.linspace(0.05, 1, min(M, N)), M, N, dtype)
    y = orthogonalize(x)
    assert y.dtype == dtype and error(y, exact) < 0.01
    values = torch.linalg.svdvals(y.float())
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("M, N", [(48, 48), (32, 128), (150, 17)])
def test_is_newton_schulz_where_its_polynomials_are_given(M, N):
    x, exact = matrix_of(torch.linspace(0.05, 1, min(M, N)), M, N, polynomials=NEWTON_SCHULZ)
    assert error(orthogonalize(x, NEWTON_SCHULZ), exact) < 0.01


@pytest.mark.parametrize("M, N", [(48, 48), (32, 128), (150, 17)])
def test_more_steps_lead_to_the_polar_factor(M, N):
    """To U V^T of the decomposition in float64, here by two of Newton-Schulz's that do not move 1."""
    x, _ = matrix_of(torch.linspace(0.05, 1, min(M, N)), M, N)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert error(orthogonalize(x, (*POLAR_EXPRESS, *[(1.875, -1.25, 0.375)] * 2)), u @ v) < 0.01


@pytest.mark.parametrize("M, N", [(48, 48), (32, 128), (150, 17)])
def test_a_norm_that_is_known_is_not_computed(M, N, monkeypatch):
    x, exact = matrix_of(torch.linspace(0.05, 1, min(M, N)), M, N)
    x = (x * (M**0.5 / x.float().norm())).half()
    monkeypatch.setattr(module, "_frobenius", None)
    # a GPU's sums round elsewhere than a CPU's, and the first polynomials make 30 times as much of it
    assert error(orthogonalize(x, norm=M**0.5), exact) < (0.01 if DEVICE.type == "cpu" else 0.03)
    few = orthogonalize(x, norm=1.5 * M**0.5)  # a bound does
    assert torch.linalg.svdvals(few.float()).min() > 0.6


HARD = {
    "falls to nothing": lambda n: torch.logspace(0, -9, n),
    "half are zero": lambda n: torch.cat((torch.linspace(0.1, 1, n - n // 2), torch.zeros(n // 2))),
    "rank of two": lambda n: torch.cat((torch.tensor([1.0, 0.5]), torch.zeros(n - 2))),
    "one is huge": lambda n: torch.cat((torch.tensor([1e4]), torch.linspace(0.5, 1, n - 1))),
    "all are equal": lambda n: torch.ones(n),
    "tiny": lambda n: torch.linspace(0.5, 1, n) * 1e-6,
    "large": lambda n: torch.linspace(0.5, 1, n) * 1e12,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("M, N", [(48, 48), (32, 64), (128, 32), (24, 192)])
def test_hard_spectra_neither_blow_up_nor_turn(M, N, name):
    """No singular value passes 1.3, and large ones and their vectors come out as without rounding."""
    x, exact = matrix_of(HARD[name](min(M, N)), M, N)
    y = orthogonalize(x).double()
    assert y.isfinite().all() and torch.linalg.svdvals(y).max() < 1.3
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    kept = s > 0.02 * s.norm()  # of these, rounding leaves the directions
    ours, wanted = ((u.T @ z @ v.T)[kept][:, kept] for z in (y, exact))
    assert error(ours, wanted) < 0.05


def test_without_the_restart_the_gram_form_blows_up(monkeypatch):
    """What the restart is for: if this holds no longer, it can go."""
    x, _ = matrix_of(torch.logspace(0, -9, 32), 32, 256)
    monkeypatch.setattr(module, "_stages", lambda *given: [given[2]])
    worst = torch.linalg.svdvals(orthogonalize(x).double().nan_to_num(1e9)).max()
    monkeypatch.undo()
    assert worst > 1.3


def test_the_gram_form_is_for_long_matrices():
    assert [len(stage) for stage in module._stages(64, 64, POLAR_EXPRESS, 2)] == [1] * 5
    assert [len(stage) for stage in module._stages(64, 127, POLAR_EXPRESS, 2)] == [1] * 5
    assert [len(stage) for stage in module._stages(128, 64, POLAR_EXPRESS, 2)] == [2, 3]
    assert sum(module._stages(64, 256, POLAR_EXPRESS, 2), ()) == POLAR_EXPRESS
    assert len(module._stages(64, 256, POLAR_EXPRESS[:2], 2)) == 1


def test_zeros_stay_zeros_and_batches_are_of_single_matrices():
    assert not orthogonalize(torch.zeros(2, 40, 90, dtype=torch.bfloat16, device=DEVICE)).any()
    x = random(2, 2, 24, 60, dtype=torch.bfloat16, grad=False)
    x = x * torch.tensor([1e-4, 1.0], device=DEVICE, dtype=x.dtype)[:, None, None]
    y = orthogonalize(x)
    assert all(torch.equal(y[i, j], orthogonalize(x[i, j])) for i in range(2) for j in range(2))


GRAM = [(1, 1, 1), (1, 33, 70), (1, 70, 33), (6, 40, 64), (1, 64, 64)]
GRAM_TMA = [(6, 40, 64), (2, 104, 56), (3, 8, 136)]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(
    "form, shape",
    [(PLAIN, shape) for shape in GRAM] + [(form, shape) for form in (TMA, WIDE) for shape in GRAM_TMA],
    indirect=["form"],
)
def test_the_gram_matrix_is_exact_and_symmetric_to_the_last_bit(shape, tall, dtype):
    x = random(*shape, dtype=dtype, grad=False)
    y, exact = module._symmetric_product(x, x, tall), x.double()
    exact = exact.mT @ exact if tall else exact @ exact.mT
    assert torch.equal(y, y.mT) and error(y, exact) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@each_form
@pytest.mark.parametrize("n", [45, 104])
def test_a_polynomial_of_a_symmetric_matrix_is_one_product(n):
    x = random(2, n, 50, dtype=torch.float16, grad=False) / 8
    g = module._symmetric_product(x, x)
    y = module._symmetric_product(g, g, False, 0.5, g, -2.0, 3.0)
    exact = 0.5 * g.double() @ g.double() - 2 * g.double() + 3 * torch.eye(n, device=DEVICE)
    assert torch.equal(y, y.mT) and error(y, exact) < 1e-3


@pytest.mark.parametrize("tall", [False, True])
def test_all_forms_agree_and_programs_go_on_until_all_blocks_are_done(choose, launches, tall):
    x = random(3, *((72, 104) if tall else (104, 72)), dtype=torch.float16, grad=False) / 8
    added = torch.eye(104, dtype=torch.float16, device=DEVICE).repeat(3, 1, 1)
    results = []
    for form in (PLAIN, TMA, WIDE):
        choose(form)
        results.append(module._symmetric_product(x, x, tall, 0.5, added, -2.0, 3.0))
    for y in results[1:]:
        assert torch.equal(y, results[0]) if DEVICE.type == "cpu" else error(y, results[0].double()) < 1e-3
    processors = module.device_facts(DEVICE).processors
    programs = [("_symmetric_kernel", 3 * 10)] + [(TMA.kernel, min(processors, 3 * n)) for n in (10, 6)]
    assert launches == programs


def test_descriptors_end_where_a_matrix_does_and_not_where_memory_does(choose):
    """Rows beyond a matrix are the next one's."""
    x = random(3, 40, 72, dtype=torch.float16, grad=False)
    x[1] = float("nan")
    for form in (TMA, WIDE):
        choose(form)
        for tall in (False, True):
            y = module._symmetric_product(x, x, tall)
            assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("case", ["n", "K", "offset", "added", "no K"])
def test_matrices_that_tma_cannot_take_go_to_the_plain_form(choose, launches, case):
    n, K = {"n": (36, 40), "K": (40, 36), "no K": (40, 0)}.get(case, (40, 40))
    memory = random(2 * n * K + 4, dtype=torch.float16, grad=False)
    x = memory[4 if case == "offset" else 0 :][: 2 * n * K].view(2, n, K)
    added = torch.ones(2 * n * n + 4, dtype=torch.float16, device=DEVICE)
    added = added[4 if case == "added" else 0 :][: 2 * n * n].view(2, n, n)
    choose(TMA)
    y = module._symmetric_product(x, x, False, 1.0, added, 2.0)
    assert error(y, x.double() @ x.double().mT + 2) < 5e-4 and launches[0][0] == "_symmetric_kernel"


@pytest.mark.parametrize("shared_memory", [101376, 232448])
def test_tma_is_offered_to_devices_that_have_it_after_what_was_measured(monkeypatch, shared_memory):
    monkeypatch.undo()
    device, table = Device("A GPU", shared_memory, 4), module._symmetric_tiles
    plain, all_ = (tiles.fitting_tiles(table, 0, d) for d in (device, device._replace(tma=True)))
    assert all_[: len(plain)] == plain and not any(tile.kernel for tile in plain)
    assert len(all_) > len(plain) and all(tile.kernel == TMA.kernel for tile in all_[len(plain) :])


def test_strides_do_not_matter_and_two_runs_agree():
    x = random(70, 33, dtype=torch.bfloat16, grad=False)
    assert torch.equal(orthogonalize(x.T), orthogonalize(x.T.contiguous()))
    assert torch.equal(orthogonalize(x), orthogonalize(x))


def test_the_operation_keeps_the_rules_of_torch():
    x = random(2, 20, 33, dtype=torch.float16, grad=False)
    gram = module._symmetric_product(x, x)
    opcheck(module._symmetric_product.registered(), (x, x, False))
    opcheck(module._symmetric_product.registered(), (gram, gram, False, 0.5, gram, 1.0, 2.0))


def test_compiles_whole_to_the_same_results():
    x = random(2, 20, 50, dtype=torch.bfloat16, grad=False)
    torch.testing.assert_close(torch.compile(orthogonalize, fullgraph=True)(x), orthogonalize(x))

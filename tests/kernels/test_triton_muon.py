"""The kernels of a Muon step against the reference in float64."""

import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, error, far_apart, muon_move, muon_move_ref, random
from torch.library import opcheck

from hotlap.kernels import muon as module
from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum, muon_momentum_ref, muon_squares
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")
DTYPE = torch.float16
SHAPES = [(1, 1, 1), (2, 33, 70), (1, 70, 33), (3, 16, 16), (2, 1, 40), (1, 40, 1)]


@pytest.fixture(params=["small blocks", "default blocks"], autouse=True)
def blocks(request, monkeypatch):
    """Rows, sums and vectors that take several blocks, and one."""
    if request.param == "small blocks":
        matrix = {"BLOCK_M": 16, "BLOCK_N": 32}
        for name, sizes in (("momentum", {"BLOCK": 16}), ("squares", matrix), ("factors", {"BLOCK": 16}),
                            ("apply", matrix)):  # fmt: skip
            monkeypatch.setattr(module, f"_muon_{name}_tiles", lambda *_, sizes=sizes: [Tile(sizes)])


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def case(G, M, N, dtype):
    """Weights, an update in the dtype, and a second moment that is not yet the update's."""
    weight, update = random(G, M, N, grad=False), random(G, M, N, dtype=dtype, grad=False, seed=1)
    second = random(G, *((M, 1) if M >= N else (1, N)), grad=False, seed=2).square()
    return weight, update, second


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_is_exact_and_the_update_is_rounded_once(shape, dtype):
    grad, momentum = random(*shape, dtype=dtype, grad=False), random(*shape, grad=False, seed=1)
    exact = momentum.double()
    expected = muon_momentum_ref(grad.double().unbind(), exact, scalar(0.95, torch.float64))
    update = muon_momentum(grad.unbind(), momentum, scalar(0.95), DTYPE)
    assert update.dtype == torch.float16 and error(update, expected) < 2**-11
    assert momentum.dtype == torch.float32 and error(momentum, exact) < 2**-22


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_second_moments_are_exact(shape, dtype):
    weight, update, second = case(*shape, dtype)
    exact = [x.double() for x in (weight, second)]
    rates = scalar(0.3, torch.float64), scalar(0.2, torch.float64)
    muon_move_ref(exact[0], update.double(), exact[1], *rates, 0.9)
    muon_move(weight, update, second, *map(torch.Tensor.float, rates), 0.9)
    assert error(weight, exact[0]) < 2**-20 and error(second, exact[1]) < 2**-20


@pytest.mark.parametrize("shape", [(2, 20, 36), (2, 36, 20)])
@pytest.mark.parametrize("layout", ["transposed", "matrices apart", "rows apart", "columns apart"])
def test_strides_do_not_matter_and_what_lies_between_stays(layout, shape):
    dim = {"transposed": None, "matrices apart": 1, "rows apart": 2, "columns apart": 3}[layout]
    memories = []

    def view(x):
        if dim is None:
            return x.mT.clone(memory_format=torch.contiguous_format).mT
        memories.append(torch.stack((x, torch.full_like(x, 7)), dim))
        return memories[-1].select(dim, 0)

    def step(weight, update, second, momentum):
        found = muon_momentum(update.unbind(), momentum, scalar(0.9), DTYPE)
        muon_move(weight, update, second, scalar(0.3), scalar(0.2), 0.9)
        return found, weight, second, momentum

    given = [*case(*shape, torch.float32), random(*shape, grad=False, seed=3)]
    for a, b in zip(step(*map(view, given)), step(*given), strict=True):
        # other strides spread a row over the threads of a GPU in another way, which sum it in another order
        assert torch.equal(a, b) if DEVICE.type == "cpu" else error(a, b.double()) < 2**-10
    assert all((memory.select(dim, 1) == 7).all() for memory in memories)


def test_matrices_may_lie_in_any_place_each_with_strides_of_its_own():
    weight, update, second = case(3, 20, 36, torch.float32)
    grad, momentum = random(3, 20, 36, grad=False, seed=3), random(3, 20, 36, grad=False, seed=4)
    expected = weight.clone(), second.clone(), momentum.clone()
    wanted = muon_momentum(grad.unbind(), expected[2], scalar(0.9), DTYPE)
    muon_move(expected[0], update, expected[1], scalar(0.3), scalar(0.2), 0.9)

    def scattered(x):
        wide = torch.full((20, 72), 7.0, device=DEVICE)
        wide[:, 1::2] = x[2]
        return [x[0].clone(), x[1].T.clone(memory_format=torch.contiguous_format).T, wide[:, 1::2]]

    weights = scattered(weight)
    found = muon_momentum(scattered(grad), momentum, scalar(0.9), DTYPE)
    muon_apply(weights, update, muon_factors(muon_squares(update), second, 20, 0.9), scalar(0.3), scalar(0.2))
    for a, b in zip((found, torch.stack(weights), second, momentum), (wanted, *expected), strict=True):
        assert torch.equal(a, b) if DEVICE.type == "cpu" else error(a, b.double()) < 2**-10


@pytest.mark.xdist_group("gigabytes")
def test_matrices_may_lie_beyond_two_to_the_31():
    grad, near = random(3, 16, 20, grad=False), random(3, 16, 20, grad=False, seed=1).half()
    far = far_apart(near)
    found, expected = (muon_momentum(grad.unbind(), m, scalar(0.9), DTYPE) for m in (far, near))
    assert torch.equal(found, expected) and torch.equal(far, near)
    for which in range(2):  # the weights, or their update
        results = []
        for move in (far_apart, torch.clone):
            given = [*case(3, 16, 20, torch.float16)]
            given[which] = move(given[which].half())
            muon_move(*given, scalar(0.3), scalar(0.2), 0.9)
            results.append(given)
        assert all(map(torch.equal, *results))


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize("side", [0, 1])
def test_rows_and_columns_of_matrices_may_lie_beyond_two_to_the_31(side):
    def far(x):
        return far_apart(x) if side == 0 else far_apart(x.mT).mT

    shape = (3, 20) if side == 0 else (20, 3)
    grad, momentum, weight = (random(*shape, grad=False, seed=i).half() for i in range(3))
    update = random(1, *shape, grad=False, seed=3).half()
    results = []
    for move in (far, torch.clone):
        state = move(momentum)[None]
        found = muon_momentum([move(grad)], state, scalar(0.9), DTYPE)
        moved, second = [move(weight)], torch.zeros(1, *((1, 20) if side == 0 else (20, 1)), device=DEVICE)
        squares = muon_squares(move(update[0])[None])
        muon_apply(
            moved, move(update[0])[None], muon_factors(squares, second, 3, 0.9), scalar(0.3), scalar(0.2)
        )
        results.append((found, state, moved[0], second))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("M, N", [(24, 56), (40, 24)])
def test_whole_steps_are_those_of_torch(M, N, choose_kernels):
    """Three of them, at the accuracy of the orthogonalisation's float16."""
    moved = []
    for kernels, dtype in (("triton", DTYPE), ("torch", torch.float32)):
        choose_kernels(kernels)
        weight, _, second = case(2, M, N, torch.float32)
        start, momentum = weight.clone(), torch.zeros_like(weight)
        for i in range(3):
            update = muon_momentum(random(2, M, N, seed=i, grad=False).unbind(), momentum, scalar(0.9), dtype)
            muon_move(weight, orthogonalize(update, norm=M**0.5), second, scalar(0.1), scalar(0.0), 0.9)
        moved.append(weight - start)
    assert error(moved[0], moved[1].double()) < 0.01


def test_two_runs_agree_bit_for_bit():
    first, second = (case(2, 33, 70, torch.float16) for _ in range(2))
    for given in (first, second):
        muon_move(*given, scalar(0.3), scalar(0.2), 0.9)
    assert all(map(torch.equal, first, second))


def test_nothing_gives_nothing():
    weight, update, second = case(0, 4, 8, torch.float16)
    assert muon_momentum(weight.unbind(), weight.clone(), scalar(0.9), DTYPE).shape == (0, 4, 8)
    muon_move(weight, update, second, scalar(0.3), scalar(0.2), 0.9)


def test_autograd_is_told_of_what_was_changed():
    weight, update, second = case(1, 4, 8, torch.float32)
    versions = [x._version for x in (weight, second)]
    muon_move(weight, update, second, scalar(0.3), scalar(0.2), 0.9)
    assert all(x._version > old for x, old in zip((weight, second), versions, strict=True))
    assert update._version == 0


def test_the_operations_keep_the_rules_of_torch():
    weight, update, second = case(2, 8, 20, torch.float16)
    opcheck(module._muon_momentum.registered(), (weight, list(random(2, 8, 20, grad=False)), scalar(0.9)))
    opcheck(module._muon_squares.registered(), (update,))
    squares = muon_squares(update)
    opcheck(module._muon_factors.registered(), (squares, second, 8, 0.9))
    weights = [w.clone() for w in weight]
    opcheck(module._muon_apply.registered(), (update, squares, weights, scalar(0.3), scalar(0.2)))


@pytest.mark.parametrize("M, N", [(30, 17), (17, 30)])
def test_rows_may_move_on_their_own(M, N):
    weight, update, second = case(2, M, N, torch.float16)
    factors, parts = muon_factors(muon_squares(update), second, 17, 0.9), weight.clone()
    muon_apply(weight.unbind(), update, factors, scalar(0.3), scalar(0.2))
    for rows in (slice(0, 5), slice(5, 5), slice(5, M)):
        some = factors[:, rows] if M > N else factors
        muon_apply(parts[:, rows].unbind(), update[:, rows], some, scalar(0.3), scalar(0.2))
    assert torch.equal(parts, weight)


def test_a_step_compiles_whole_and_once_to_the_same_results():
    def step(grad, momentum, weight, second, beta, lr):
        update = orthogonalize(muon_momentum((grad * 2).unbind(), momentum, beta, DTYPE), norm=8**0.5)
        muon_move(weight, update, second, lr, lr, 0.9)

    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        weight, _, second = case(2, 8, 20, torch.float16)
        momentum = torch.zeros_like(weight)
        for rate in (0.9, 0.8):
            grad = random(2, 8, 20, grad=False, seed=int(10 * rate))
            with torch._dynamo.config.patch(error_on_recompile=rate == 0.8):
                function(grad, momentum, weight, second, scalar(rate), scalar(1 - rate))
        results.append((momentum, weight, second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)

"""Orthogonalisation and the two halves of a Muon step, by the properties that define them."""

import pytest
import torch
from helpers.kernel_tools import DEVICE, muon_move

from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum
from hotlap.kernels.orthogonalize import orthogonalize


@pytest.fixture(params=["torch", "triton", "c"])
def kernels(request, choose_kernels) -> torch.dtype:
    """Every path, and the dtype of its updates: without rounding but for Triton."""
    if request.param == "torch":
        choose_kernels("torch")
    else:
        request.getfixturevalue(f"{request.param}_kernels")
    return torch.float16 if request.param == "triton" else torch.float32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def matrix_of(singular_values, M, N):
    """A random matrix (M, N) with these singular values, and its polar factor."""
    rank = len(singular_values)
    u, v = torch.linalg.qr(random(M, rank))[0], torch.linalg.qr(random(N, rank, seed=1))[0]
    return u * singular_values.to(DEVICE) @ v.T, u @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N", [(96, 32), (32, 96), (64, 64), (1, 40), (40, 1)])
def test_singular_values_become_one_and_vectors_stay(M, N, dtype):
    x, polar = matrix_of(torch.linspace(0.05, 1, min(M, N)), M, N)
    y = orthogonalize(x.to(dtype))
    assert y.dtype == dtype and y.shape == x.shape
    values = torch.linalg.svdvals(y.float())
    assert values.min() > 0.6 and values.max() < 1.3
    cosine = (y.float() * polar).sum() / (y.float().norm() * polar.norm())
    assert cosine > 0.98


def test_each_matrix_of_a_batch_is_orthogonalised_on_its_own():
    x = random(2, 3, 24, 40) * torch.tensor([1e-4, 1.0, 1e4], device=DEVICE)[:, None, None]
    y = orthogonalize(x)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(y[i, j], orthogonalize(x[i, j]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nearly_singular_matrix_does_not_blow_up(dtype):
    values = torch.cat((torch.linspace(0.1, 1, 24), torch.full((8,), 1e-7)))
    x, _ = matrix_of(values, 64, 32)
    found = torch.linalg.svdvals(orthogonalize(x.to(dtype)).float())
    assert found.max() < 1.3 and found[:24].min() > 0.6
    assert not orthogonalize(torch.zeros(8, 8, dtype=dtype, device=DEVICE)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_huge_value_does_not_blow_up(dtype):
    x = random(48, 32)
    x[3, 5] = 1e6
    values = torch.linalg.svdvals(orthogonalize(x.to(dtype)).float())
    assert 0.6 < values.max() < 1.3


def test_momentum_is_nesterov_with_rows_of_norm_one(kernels):
    grad, momentum, beta = random(3, 6, 10), random(3, 6, 10, seed=1), scalar(0.9)
    grad[0, 2], momentum[0, 2] = 0, 0
    old = momentum.clone()
    update = muon_momentum(grad.unbind(), momentum, beta, kernels).float()
    torch.testing.assert_close(momentum, 0.9 * old + 0.1 * grad)
    assert not update[0, 2].any()  # a row without gradient stays without, and is not a division by zero
    expected = torch.nn.functional.normalize(0.1 * grad + 0.9 * momentum, dim=-1)
    torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("M, N", [(12, 20), (20, 12)])
def test_every_step_has_the_norm_of_an_orthogonal_matrix(M, N, kernels):
    along = (2, M, 1) if M >= N else (2, 1, N)
    weight, second = random(2, M, N), torch.zeros(along, device=DEVICE)
    for step in range(3):  # the second moment scales rows against each other, never the whole
        old = weight.clone()
        update = 1e3**step * random(2, M, N, seed=step)
        muon_move(weight, update, second, scalar(0.02), scalar(0.0), 0.9)
        norm = (weight - old).norm(dim=(-2, -1)).cpu()
        torch.testing.assert_close(norm, torch.full((2,), 0.02 * min(M, N) ** 0.5), rtol=1e-4, atol=0)


def test_rows_that_were_large_before_are_scaled_down(kernels):
    second = torch.ones(1, 4, 1, device=DEVICE)
    second[0, 0] = 100
    weight = torch.zeros(1, 4, 4, device=DEVICE)
    muon_move(weight, torch.ones(1, 4, 4, device=DEVICE), second, scalar(0.1), scalar(0.0), 0.99)
    size = weight[0].abs().mean(-1)
    assert size[0] < 0.2 * size[1]
    torch.testing.assert_close(size[1:], size[1:2].expand(3))


def test_decay_shrinks_only_weights_that_the_step_shrinks_too(kernels):
    start, update = random(1, 16, 16), random(1, 16, 16, seed=1)
    moved = []
    for amount in (0.0, 0.5):
        weight, second = start.clone(), torch.zeros(1, 16, 1, device=DEVICE)
        muon_move(weight, update.clone(), second, scalar(0.1), scalar(amount), 0.9)
        moved.append(weight)
    agrees = update * start > 0
    torch.testing.assert_close(moved[1] - moved[0], -0.1 * 0.5 * start * agrees)
    assert agrees.any() and not agrees.all()


def test_an_update_of_zeros_moves_nothing_and_one_that_is_not_a_number_is_not_hidden(kernels):
    weight, second = random(2, 6, 4), torch.zeros(2, 6, 1, device=DEVICE)
    update, old = torch.zeros(2, 6, 4, device=DEVICE), weight.clone()
    update[1, 0, 0] = float("nan")
    muon_move(weight, update, second, scalar(0.1), scalar(0.0), 0.9)
    assert torch.equal(weight[0], old[0]) and weight[1].isnan().all()
    grad, momentum = random(1, 3, 5), random(1, 3, 5)
    grad[0, 1, 2] = float("nan")
    assert muon_momentum(grad.unbind(), momentum, scalar(0.9), kernels)[0, 1].isnan().all()


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match=r"momentum is \(2, 4, 6\) and gradients are 2 of \(6, 4\)"):
        muon_momentum(x.unbind(), x.mT, scalar(0.9), torch.float16)
    with pytest.raises(ValueError, match=r"gradients are 1 of \(6, 4\)"):
        muon_momentum([x[0]], x, scalar(0.9), torch.float16)
    for factors in (torch.zeros(2, 1, 6), torch.zeros(6, 1)):
        with pytest.raises(ValueError, match=r"\(G, M, 1\) or \(G, 1, N\)"):
            muon_apply(x.unbind(), x, factors, scalar(0.1), scalar(0.0))
    with pytest.raises(ValueError, match=r"weights are 1 of \(6, 4\), 1 of \(4, 6\), update is \(2, 6, 4\)"):
        muon_apply([x[0], x[0].T], x, torch.zeros(2, 6, 1), scalar(0.1), scalar(0.0))
    with pytest.raises(ValueError, match=r"squares are \(2, 6, 1\) and second_moment \(2, 1, 4\)"):
        muon_factors(torch.zeros(2, 6, 1), torch.zeros(2, 1, 4), 4, 0.9)

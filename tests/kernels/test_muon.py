"""Orthogonalisation and the two halves of a Muon step, by the properties that define them."""

import pytest
import torch

from hotlap.kernels.muon import muon_apply, muon_momentum
from hotlap.kernels.orthogonalize import orthogonalize


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(singular_values, M, N):
    """A random matrix (M, N) with these singular values, and its polar factor."""
    rank = len(singular_values)
    u, v = torch.linalg.qr(random(M, rank))[0], torch.linalg.qr(random(N, rank, seed=1))[0]
    return u * torch.as_tensor(singular_values) @ v.T, u @ v.T


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
    x = random(2, 3, 24, 40) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
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
    assert not orthogonalize(torch.zeros(8, 8, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_huge_value_does_not_blow_up(dtype):
    x = random(48, 32)
    x[3, 5] = 1e6
    values = torch.linalg.svdvals(orthogonalize(x.to(dtype)).float())
    assert 0.6 < values.max() < 1.3


def test_momentum_is_nesterov_with_rows_of_one_norm():
    grad, momentum, beta = random(3, 6, 10), random(3, 6, 10, seed=1), torch.tensor(0.9)
    grad[0, 2], momentum[0, 2] = 0, 0
    old = momentum.clone()
    update = muon_momentum(grad.clone(), momentum, beta)
    torch.testing.assert_close(momentum, 0.9 * old + 0.1 * grad)
    nesterov = 0.1 * grad + 0.9 * momentum
    assert not update[0, 2].any()  # a row without gradient stays without, and is not a division by zero
    norms = update.norm(dim=-1)
    torch.testing.assert_close(norms[1:], nesterov[1:].norm(dim=-1).mean(-1, keepdim=True).expand(2, 6))
    cosine = torch.cosine_similarity(update[1:], nesterov[1:], dim=-1)
    torch.testing.assert_close(cosine, torch.ones(2, 6))


@pytest.mark.parametrize("M, N", [(12, 20), (20, 12)])
def test_every_step_has_the_norm_of_an_orthogonal_matrix(M, N):
    along = (2, M, 1) if M >= N else (2, 1, N)
    weight, second = random(2, M, N), torch.zeros(along)
    lr, none = torch.tensor(0.02), torch.tensor(0.0)
    for step in range(3):  # the second moment scales rows against each other, never the whole
        old = weight.clone()
        muon_apply(weight, 1e3**step * random(2, M, N, seed=step), second, lr, none, 0.9)
        norm = (weight - old).norm(dim=(-2, -1))
        torch.testing.assert_close(norm, torch.full((2,), 0.02 * min(M, N) ** 0.5), rtol=1e-4, atol=0)


def test_rows_that_were_large_before_are_scaled_down():
    second = torch.ones(1, 4, 1)
    second[0, 0] = 100
    weight = torch.zeros(1, 4, 4)
    muon_apply(weight, torch.ones(1, 4, 4), second, torch.tensor(0.1), torch.tensor(0.0), 0.99)
    size = weight[0].abs().mean(-1)
    assert size[0] < 0.2 * size[1]
    torch.testing.assert_close(size[1:], size[1:2].expand(3))


def test_decay_shrinks_only_weights_that_the_step_shrinks_too():
    start, update = random(1, 16, 16), random(1, 16, 16, seed=1)
    lr, decay = torch.tensor(0.1), torch.tensor(0.5)
    moved = []
    for amount in (torch.tensor(0.0), decay):
        weight = start.clone()
        muon_apply(weight, update.clone(), torch.zeros(1, 16, 1), lr, amount, 0.9)
        moved.append(weight)
    agrees = update * start > 0
    torch.testing.assert_close(moved[1] - moved[0], -lr * decay * start * agrees)
    assert agrees.any() and not agrees.all()

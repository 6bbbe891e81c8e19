"""The chunked loss against the reference and against float64."""

import pytest
import torch
import torch.nn.functional as F
from tools import assert_as_good

from hotlap.kernels import cross_entropy
from hotlap.kernels.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_ref

N, D, V = 53, 24, 101


def problem(dtype=torch.float32, ignored=(0, 7, 52)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    head = (3 * torch.randn(V, D, generator=generator)).requires_grad_()  # logits large enough to be capped
    targets = torch.randint(V, (N,), generator=generator)
    targets[list(ignored)] = IGNORE
    return x, head, targets


def naive(x, head, targets, softcap, reduction):
    """One logarithm a token, in float64."""
    logits = x @ head.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = [row.exp().sum().log() - row[t] for row, t in zip(logits, targets, strict=True) if t != IGNORE]
    total = torch.stack(losses).sum()
    return total / len(losses) if reduction == "mean" else total


def with_gradients(function, x, head, targets, softcap, reduction, scale):
    loss = function(x, head, targets, softcap, reduction)
    return loss.detach(), *torch.autograd.grad(loss * scale, (x, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_chunks_give_the_loss_and_both_gradients(rows, reduction, softcap, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda V, D: rows)
    x, head, targets = problem(dtype)
    arguments = (targets, softcap, reduction, 0.37)
    actual = with_gradients(linear_cross_entropy, x, head, *arguments)
    plain = with_gradients(linear_cross_entropy_ref, x, head, *arguments)
    exact_head = head.detach().to(dtype).double().requires_grad_()  # what the product is given
    exact = with_gradients(naive, x.detach().double().requires_grad_(), exact_head, *arguments)
    for one, other, wanted in zip(actual, plain, exact, strict=True):
        assert_as_good(one, other, wanted)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype and actual[2].dtype == torch.float32


def test_ignored_tokens_carry_no_loss_and_no_gradient():
    x, head, targets = problem()
    kept = targets != IGNORE
    loss, dx, dw = with_gradients(linear_cross_entropy, x, head, targets, 15.0, "sum", 1.0)
    alone = with_gradients(linear_cross_entropy, x[kept], head, targets[kept], 15.0, "sum", 1.0)
    assert not dx[~kept].any()
    for one, other in zip((loss, dx[kept], dw), (alone[0], alone[1], alone[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_batch_without_any_loss_is_zero_and_teaches_nothing():
    x, head, targets = problem(ignored=range(N))
    loss, dx, dw = with_gradients(linear_cross_entropy, x, head, targets, 15.0, "sum", 1.0)
    assert loss == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("learning", [True, False])
def test_every_reduction_is_pytorchs_with_and_without_gradients(learning, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda V, D: 16)
    x, head, targets = problem()
    with torch.set_grad_enabled(learning):
        losses = linear_cross_entropy(x, head, targets, 0.0, reduction)
    expected = F.cross_entropy(x @ head.T, targets, ignore_index=IGNORE, reduction=reduction)
    torch.testing.assert_close(losses, expected)
    assert losses.requires_grad == learning

"""The halves of a Muon step in C against torch's."""

import pytest
import torch

from hotlap.kernels.muon import muon_apply, muon_momentum

pytestmark = pytest.mark.usefixtures("c_kernels")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views(shape):
    """Matrices of one shape, in every layout."""
    M, N = shape
    return [
        random(M, N),
        random(N, M, seed=1).T,
        random(M, 2 * N, seed=2)[:, ::2],
        random(M, N + 3, seed=3)[:, 3:],
    ]


@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 193), (193, 7), (1, 40), (0, 8)])
def test_steps_are_those_of_torch_in_any_layout(shape, dtype, choose_kernels):
    results = []
    for kernels in ("c", "torch"):
        choose_kernels(kernels)
        weights, momentum = views(shape), random(4, *shape, seed=4)
        update = muon_momentum(views(shape), momentum, torch.tensor(0.9), dtype)
        factors = random(4, shape[0], 1, seed=5).abs()
        muon_apply(weights, update, factors, torch.tensor(0.1), torch.tensor(0.3))
        muon_apply(
            weights,
            update.mT.contiguous().mT,
            random(4, 1, shape[1], seed=6),
            torch.tensor(0.1),
            torch.tensor(0.0),
        )
        results.append([update, momentum, *weights])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(
            ours, torchs, **({"rtol": 0.01, "atol": 1e-3} if dtype == torch.bfloat16 else {})
        )


def test_what_lies_between_the_columns_of_a_weight_stays():
    memory = torch.full((6, 10), 7.0)
    muon_apply([memory[:, ::2]], random(1, 6, 5), torch.ones(1, 6, 1), torch.tensor(0.1), torch.tensor(0.0))
    assert (memory[:, 1::2] == 7).all() and (memory[:, ::2] != 7).all()


def test_autograd_is_told_of_what_was_changed():
    weight, momentum = random(4, 8).requires_grad_(), random(1, 4, 8, seed=1)
    loss = (weight * weight).sum() + (momentum * weight.detach()[None]).sum()
    update = muon_momentum([random(4, 8, seed=2)], momentum, torch.tensor(0.9), torch.float32)
    with torch.no_grad():
        muon_apply([weight], update, torch.ones(1, 4, 1), torch.tensor(0.1), torch.tensor(0.0))
    assert weight._version > 0 and momentum._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

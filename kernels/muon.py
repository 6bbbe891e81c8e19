"""The elementwise halves of a Muon step, before and after the orthogonalisation (Jordan et al., 2024).

Before: momentum, Nesterov, and rows scaled to a common norm (MuonEq). After: NorMuon's second moment (Li et
al., 2025) with the update's norm kept, cautious weight decay (only where update and weight agree in sign;
Liang et al., 2024), and the step itself.
"""
# G matrices of one shape, M rows, N columns

from __future__ import annotations

from torch import Tensor

EPS = 1e-10


def muon_momentum_ref(grad: Tensor, momentum: Tensor, beta: Tensor) -> Tensor:
    """Update momentum (G, M, N) in place with grad, and return the equilibrated Nesterov update (G, M, N)."""
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp(momentum, beta)
    row_norm = update.norm(dim=-1, keepdim=True)  # (G, M, 1)
    return update * (row_norm.mean(-2, keepdim=True) / (row_norm + EPS))


def muon_apply_ref(
    weight: Tensor, update: Tensor, second_moment: Tensor, lr: Tensor, decay: Tensor, beta2: float
) -> None:
    """Move weight (G, M, N) by the orthogonalised update, in place.

    second_moment: (G, M, 1), or (G, 1, N) for wide matrices: running mean square along the long side.
    lr: step size; decay: the share of the weight that lr takes away. Both 0-D, so that nothing recompiles.
    """
    M, N = weight.shape[-2:]
    update = update.float()
    update = update * (min(M, N) ** 0.5 / (update.norm(dim=(-2, -1), keepdim=True) + EPS))
    along = -1 if second_moment.shape[-1] == 1 else -2
    second_moment.lerp_(update.square().mean(along, keepdim=True), 1 - beta2)
    scaled = update * (second_moment + EPS).rsqrt()
    scaled = scaled * (min(M, N) ** 0.5 / (scaled.norm(dim=(-2, -1), keepdim=True) + EPS))
    cautious = (scaled * weight >= 0).to(weight.dtype)
    weight.sub_(lr * (scaled + decay * weight * cautious))


muon_momentum = muon_momentum_ref
muon_apply = muon_apply_ref

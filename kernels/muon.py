"""The elementwise halves of a Muon step, before and after the orthogonalisation (Jordan et al., 2024).

Before: momentum, Nesterov, and rows scaled to norm 1 (MuonEq; the orthogonalisation divides by the norm of
the whole). After: NorMuon's second moment (Li et al., 2025) with the update's norm kept, cautious weight
decay (only where update and weight agree in sign; Liang et al., 2024), and the step itself.

All but the squares work on any rows of the matrices, so that each rank does its own. The second moment
follows from the sums of squares alone, which are as long as a side of a matrix.
"""
# G matrices of one shape, M rows, N columns

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-10


def muon_momentum_ref(grad: Tensor, momentum: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Update momentum (G, M, N) in place with grad, and return the Nesterov update in dtype, rows of norm 1.

    Rows without any gradient stay zero. beta: 0-D.
    """
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp(momentum, beta)
    return (update / (update.norm(dim=-1, keepdim=True) + EPS)).to(dtype)


def muon_squares_ref(update: Tensor) -> Tensor:
    """Sums of squares along the longer side of each matrix of update (G, M, N), in float32: (G, M), or for
    wide matrices (G, N).
    """
    return update.float().square().sum(-1 if update.shape[-2] >= update.shape[-1] else -2)


def muon_factor(squares: Tensor, second_moment: Tensor, shape: tuple[int, int], beta2: float) -> Tensor:
    """Update second_moment in place, and return what the rows or columns of the update are multiplied by.

    squares, second_moment and the result: (G, M), or (G, N) for wide matrices, of updates of `shape` (M, N).
    The scaled update has the norm of an orthogonal matrix.
    """
    short, long = sorted(shape)
    whole = squares.sum(-1, keepdim=True) + EPS  # (G, 1)
    mean = squares * (short / whole / long)  # mean square of an element, of an update of norm sqrt(short)
    second_moment.lerp_(mean, 1 - beta2)
    factor = (second_moment + EPS).rsqrt()
    norm = (factor.square() * squares).sum(-1, keepdim=True).sqrt()
    return factor * (short**0.5 / (norm + EPS))


def muon_apply_ref(weight: Tensor, update: Tensor, factor: Tensor, lr: Tensor, decay: Tensor) -> None:
    """Move weight (G, M, N) in place by -lr times the scaled update, and shrink it where both agree in sign.

    factor: (G, M, 1) or (G, 1, N), by which update is scaled. lr: step size; decay: the share of the weight
    that lr takes away; both 0-D, so that nothing recompiles.
    """
    scaled = update.float() * factor
    cautious = (scaled * weight >= 0).to(weight.dtype)
    weight.sub_(lr * (scaled + decay * weight * cautious))


muon_momentum = muon_momentum_ref
muon_squares = muon_squares_ref
muon_apply = muon_apply_ref

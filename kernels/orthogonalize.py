"""The nearest semi-orthogonal matrix, which is Muon's update: U V^T of the singular value decomposition.

Polar Express (Amsel et al., 2025): five odd polynomials a X + b (X X^T) X + c (X X^T)^2 X, whose coefficients
are the best possible for singular values in [1e-3, 1] at each step, with their safety factor of 1.01.
"""

from __future__ import annotations

from torch import Tensor

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize_ref(x: Tensor) -> Tensor:
    """The specification. x: (..., M, N), in the dtype that it is computed in and returned."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the short side is the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalize(x: Tensor) -> Tensor:
    """Polar factor of each matrix of x (..., M, N), singular values within about 0.7 to 1.2 of 1. Same
    dtype.
    """
    return orthogonalize_ref(x)

"""ReLU^2: max(x, 0)^2, elementwise (Primer, So et al., 2021)."""

from __future__ import annotations

from torch import Tensor


def relu2_ref(x: Tensor) -> Tensor:
    """The specification. x: any shape; returns x's dtype."""
    return x.relu().square()


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise. Same shape and dtype as x."""
    return relu2_ref(x)

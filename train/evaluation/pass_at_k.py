"""pass@k: the chance that at least one of k answers to a prompt is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
SEED = 0


def pass_at_k(n: int, right: int, k: int) -> float:
    """The unbiased estimate from n answers, of which some are right: 1 - C(n - right, k) / C(n, k).

    ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers a prompt (k >= 1), not {right} right of {n}")
    return 1.0 - math.prod((n - right - i) / (n - i) for i in range(k))


def mean_pass_at_k(right: Sequence[int], n: int, k: int) -> dict:
    """Mean over prompts of pass@k, its 95 % interval, and the number of prompts. right: how many of n answers
    are, prompt by prompt.

    The interval is of bootstrap means over the prompts: the same for the same counts.
    """
    if not right:
        raise ValueError("pass@k needs at least one prompt")
    each = np.array([pass_at_k(n, count, k) for count in right])
    generator = np.random.default_rng(SEED)
    means = [each[generator.integers(0, len(each), len(each))].mean() for _ in range(RESAMPLES)]
    return {
        "accuracy": float(each.mean()),
        "interval": [float(end) for end in np.quantile(means, (0.025, 0.975))],
        "n": len(each),
    }

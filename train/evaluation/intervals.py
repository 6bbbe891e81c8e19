"""Accuracies with 95 % intervals, means of accuracies of which chance is taken off, and differences."""

from __future__ import annotations

import math

Z = 1.959964  # normal quantile of a two-sided 95 % interval


def counted(right: int, n: int) -> dict:
    """Accuracy, its 95 % interval (Wilson, 1927), and n."""
    share, spread = right / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    return {"accuracy": share, "interval": [max(0.0, middle - half), min(1.0, middle + half)], "n": n}


def centred(score: dict, chance: float) -> dict:
    """A score with its chance, and as `centred` what is above it: 0 for random guessing, 1 for all right."""
    return score | {"centred": (score["accuracy"] - chance) / (1 - chance), "chance": chance}


def centred_mean(scores: list[dict]) -> tuple[float, list[float]]:
    """The mean of centred scores and its 95 % interval: the scores' are added in quadrature, as if
    independent.
    """
    mean = sum(score["centred"] for score in scores) / len(scores)
    halves = [(s["interval"][1] - s["interval"][0]) / 2 / (1 - s["chance"]) for s in scores]
    half = math.hypot(*halves) / len(halves)
    return mean, [mean - half, mean + half]


def difference(
    later: tuple[float, list[float]], earlier: tuple[float, list[float]]
) -> tuple[float, list[float]]:
    """What a score has gained over an earlier one, each given with its interval, and the interval of the gain
    (Newcombe, 1998, method 10), as if both were independent. Scores of the same questions are not: their
    difference is known better than this says.
    """
    (score, (low, high)), (before, (before_low, before_high)) = later, earlier
    gain = score - before
    down, up = math.hypot(score - low, before_high - before), math.hypot(high - score, before - before_low)
    return gain, [gain - down, gain + up]

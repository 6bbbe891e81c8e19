"""How much compute a change saves: the compute multiplier of two recipes that were trained in pairs.

The loss of A falls with its compute C as a law, log bpb = constant - exponent log C. The law tells at what
compute A would have B's loss; B's own compute, divided by that, is the multiplier m:

    log m = log(C_B / C_A) - log(bpb_A / bpb_B) / exponent

In a pair, both recipes have the same depth and seed, so most of what moves one loss moves the other. The law
needs no floor of the loss: what counts is how steep it is where the runs are. A floor bends it, which at half
the compute moves the mean over the ladder by 2 % (calculated, with a floor of 0.6 under losses of 2 to 1.4).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SURE = 0.95  # of the intervals
FEWEST_DEPTHS = 3  # for an exponent and its error
FEWEST_FOR_TREND = 4  # depths: a floor bends the law, which looks like a trend until the bend is fitted


class NoLaw(ValueError):
    """A's runs do not show how its loss falls with compute. Says why, after "as"."""


@dataclass(frozen=True)
class Pairs:
    """Runs of A and B at the same depths and seeds. Arrays of shape (pairs, 2), A before B."""

    depths: np.ndarray
    """Shape (pairs,)."""
    bpb: np.ndarray
    compute: np.ndarray
    """FLOPs or seconds of the runs."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        return f"{self.low:.{self.digits}f} to {self.high:.{self.digits}f}"

    @property
    def digits(self) -> int:
        return 3 if self.high - self.low < 0.05 else 2

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f} ({self.interval})"


@dataclass(frozen=True)
class Multiplier:
    """What B needs of A's compute for A's loss."""

    overall: Estimate
    """Geometric mean over the pairs."""
    by_depth: dict[int, Estimate]
    """At each depth, with a spread that all depths share."""
    trend: Estimate | None
    """The factor by which the multiplier changes with ten times the compute; None if there are too few
    depths, or compute is measured."""
    exponent: float
    """Of A's law."""
    exponent_error: float
    """Standard error."""

    @property
    def found(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.overall.low <= 1 <= self.overall.high


def multiplier(pairs: Pairs, measured: bool = False) -> Multiplier:
    """The compute multiplier of B. NoLaw if the pairs have too few depths, or A's loss does not fall with
    compute surely enough for an exponent.

    measured: compute is a measurement of each depth, such as seconds, and the pairs of a depth share its
    error; so the spread is that between depths. Otherwise compute is known exactly, and it is between pairs.
    """
    depths, place = np.unique(pairs.depths, return_inverse=True)
    if len(depths) < FEWEST_DEPTHS:
        raise NoLaw(f"{len(depths)} depths have runs of both, and a law needs {FEWEST_DEPTHS}")

    def means(values: np.ndarray) -> np.ndarray:
        return np.array([values[place == i].mean() for i in range(len(depths))])

    x, y = np.log(pairs.compute), np.log(pairs.bpb)
    centred, levels = means(x[:, 0]) - means(x[:, 0]).mean(), means(y[:, 0])
    law, covariance, _ = least_squares(centred, levels, 1)
    exponent, error = -law[1], covariance[1, 1] ** 0.5
    uncertain = quantile(len(depths) - 2) * error
    if exponent <= uncertain:
        raise NoLaw("the losses do not fall surely with compute: add depths that are further apart")
    by_law = uncertain / exponent**2  # of log m, for each unit of the gap
    costs, gaps = x[:, 1] - x[:, 0], y[:, 0] - y[:, 1]
    logs = costs - gaps / exponent
    degree = int(len(depths) >= FEWEST_FOR_TREND)  # the multiplier may change along a line
    values, at = (means(logs), centred) if measured else (logs, centred[place])
    line, errors, spread = least_squares(at, values, degree)
    sure = quantile(len(values) - degree - 1)
    counts = np.ones(len(depths)) if measured else np.bincount(place)
    return Multiplier(
        estimate(line[0], sure * errors[0, 0] ** 0.5, by_law * gaps.mean()),
        {
            int(depth): estimate(value, sure * spread / count**0.5, by_law * gap)
            for depth, value, count, gap in zip(depths, means(logs), counts, means(gaps), strict=True)
        },
        trend(costs, gaps, centred, levels, place) if degree and not measured else None,
        float(exponent),
        float(error),
    )


def trend(
    costs: np.ndarray, gaps: np.ndarray, centred: np.ndarray, levels: np.ndarray, place: np.ndarray
) -> Estimate | None:
    """The factor on the multiplier for ten times the compute, by a law that may bend. None if that law rises.

    costs, gaps: log(C_B / C_A) and log(bpb_A / bpb_B) of the pairs. centred, levels: A's log compute and
    log bits per byte at the depths. place: which of them each pair has.
    """
    law, covariance, _ = least_squares(centred, levels, 2)
    at = centred[place]
    falls = np.stack([0 * at, -np.ones_like(at), -2 * at], 1)  # the exponent at each pair, by the law's terms
    exponents = falls @ law
    if exponents.min() <= 0:
        return None
    line, errors, _ = least_squares(at, costs - gaps / exponents, 1)
    by_law = ((at - at.mean()) * gaps / exponents**2) @ falls / ((at - at.mean()) @ at)
    by_pairs = quantile(len(gaps) - 2) * errors[1, 1] ** 0.5
    by_bend = quantile(len(centred) - 3) * (by_law @ covariance @ by_law) ** 0.5
    return estimate(*(np.log(10) * part for part in (line[1], by_pairs, by_bend)))


def estimate(log: float, *halves: float) -> Estimate:
    """halves: of the widths of the interval of `log`, from independent causes."""
    half = np.hypot.reduce(halves)
    return Estimate(*(float(np.exp(v)) for v in (log, log - half, log + half)))


def least_squares(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients of a polynomial, the constant first, their covariance, and the standard deviation of y."""
    terms = np.vander(x, degree + 1, increasing=True)
    inverse = np.linalg.inv(terms.T @ terms)
    found = inverse @ terms.T @ y
    left = y - terms @ found
    variance = left @ left / (len(y) - degree - 1)
    return found, inverse * variance, variance**0.5


@functools.cache
def quantile(freedom: int) -> float:
    """Half the width of a 95 % interval in standard errors, with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + SURE) / 2, freedom))

"""How the loss of runs falls: bpb = A x^-b, or with enough runs bpb = E + A x^-b, where x is what a run
takes, such as FLOPs, and E the irreducible loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_FOR_FLOOR = 6  # runs needed to fit E: with fewer, three parameters fit noise


@dataclass(frozen=True)
class Law:
    """bpb = floor + factor * x^-exponent.

    exponent_error: standard error. floors: the range of the floor when any one run is left out.
    """

    floor: float
    factor: float
    exponent: float
    exponent_error: float
    floors: tuple[float, float] | None
    residual: float
    """Root mean square error of the fit, in bits per byte."""

    def at(self, x: float) -> float:
        return self.floor + self.factor * x**-self.exponent

    def __str__(self) -> str:
        text = f"exponent {self.exponent:.3f} ± {self.exponent_error:.3f}, RMS error {self.residual:.4f}"
        if self.floors:
            low, high = self.floors
            text += f", floor {self.floor:.3f} ({low:.3f} to {high:.3f} with any one run left out)"
        return text


def fit_law(x: Sequence[float], bpb: Sequence[float]) -> Law:
    """Least squares of log(bpb - floor) over log x. The floor is the best-fitting one if there are enough
    runs, else 0.
    """
    x, y = np.asarray(x, float), np.asarray(bpb, float)
    if len(x) < FEWEST_FOR_FLOOR:
        return with_floor(x, y, 0.0)
    found = best_floor(x, y)
    others = [best_floor(np.delete(x, i), np.delete(y, i)) for i in range(len(x))]
    return dataclasses.replace(with_floor(x, y, found), floors=(min(others), max(others)))


def best_floor(x: np.ndarray, y: np.ndarray) -> float:
    floors = np.linspace(0, 0.999 * y.min(), 1000)
    return float(min(floors, key=lambda floor: with_floor(x, y, floor).residual))


def with_floor(x: np.ndarray, y: np.ndarray, floor: float) -> Law:
    logs = np.log(x) - np.log(x).mean()
    values = np.log(y - floor)
    slope = float(logs @ values / (logs @ logs))
    factor = float(np.exp(values.mean() - slope * np.log(x).mean()))
    left = values - values.mean() - slope * logs
    error = float((left @ left / (len(x) - 2) / (logs @ logs)) ** 0.5)
    residual = float(np.sqrt(np.mean((floor + factor * x**slope - y) ** 2)))
    return Law(float(floor), factor, -slope, error, None, residual)

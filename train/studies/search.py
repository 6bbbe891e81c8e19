"""Coordinate descent over the shapes of a training run, by scores that are noisy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import mean, median, variance

from hotlap.train.speedruns.shapes import TrainingShape

Scores = dict[TrainingShape, list[float]]  # bits per byte of each seed; infinite if a shape cannot be trained

LEAST = {"depth": 1, "step_tokens": 64, "vocab_size": 512, "context": 64}
MOST_VOCABULARY = 1 << 16
SURE = 2.0  # standard errors of a difference between two means


def search(
    start: TrainingShape, axes: Sequence[str], score: Callable[[TrainingShape], list[float]]
) -> tuple[TrainingShape, Scores]:
    """The best shape, and the scores of all that were tried: along one axis after the other, as far as it
    gets better by more than the noise, until no neighbour is better.
    """
    best, found = start, {start: score(start)}

    def scored(shape: TrainingShape) -> float:
        if shape not in found:
            found[shape] = score(shape)
        return mean(found[shape])

    moved = True
    while moved:
        moved = False
        for axis in axes:
            ways = [way for way in (-1, 1) if neighbour(best, axis, way)]
            way = min(ways, key=lambda way: scored(neighbour(best, axis, way)), default=0)
            while way and (to := neighbour(best, axis, way)):
                scored(to)
                if not better(to, best, found):
                    break
                best, moved = to, True
    return best, found


def neighbour(shape: TrainingShape, axis: str, direction: int) -> TrainingShape | None:
    """The next smaller (-1) or larger (1) shape: a quarter of the layers apart, or half or twice the rest."""
    value = getattr(shape, axis)
    if axis == "depth":
        value += direction * max(1, value // 4)
    else:
        value = value * 2 if direction > 0 else value // 2
    if value < LEAST[axis] or (axis == "vocab_size" and value > MOST_VOCABULARY):
        return None
    to = dataclasses.replace(shape, **{axis: value})
    return to if to.context <= to.step_tokens else None


def better(a: TrainingShape, b: TrainingShape, found: Scores) -> bool:
    """Whether a's mean is below b's by more than the noise of all scores together."""
    margin = SURE * noise(found) * (1 / len(found[a]) + 1 / len(found[b])) ** 0.5
    return mean(found[a]) < mean(found[b]) - margin


def noise(found: Scores) -> float:
    """Standard deviation between seeds, from the median variance of the shapes: each has few seeds, and a
    shape that is unstable must not hide what others gain. 0 if no shape has scores.
    """
    finite = [scores for scores in found.values() if all(map(math.isfinite, scores))]
    if not finite:
        return 0.0
    freedom = min(map(len, finite)) - 1
    expected = (1 - 2 / (9 * freedom)) ** 3  # the median of variances / their mean (Wilson and Hilferty)
    return (median(map(variance, finite)) / expected) ** 0.5

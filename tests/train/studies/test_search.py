"""The search finds the best of a landscape that is known, in spite of noise."""

import math
import random

import pytest

from hotlap.train.speedruns.shapes import TrainingShape
from hotlap.train.studies.search import neighbour, noise, search

AXES = ("depth", "step_tokens", "context", "vocab_size")
START = TrainingShape(2, 512, 8192, 8192)


def landscape(best: TrainingShape, spread: float, seed: int = 0):
    """Scores of three seeds that rise with the square of the doublings to the best; and what was asked."""
    draws, asked = random.Random(seed), []

    def score(shape: TrainingShape) -> list[float]:
        asked.append(shape)
        away = sum(math.log2(getattr(shape, axis) / getattr(best, axis)) ** 2 for axis in AXES)
        return [1.4 + 0.02 * away + draws.gauss(0, spread) for _ in range(3)]

    return score, asked


@pytest.mark.parametrize(
    "best",
    [START, TrainingShape(5, 512, 8192, 8192), TrainingShape(1, 256, 2048, 2048),
     TrainingShape(6, 1024, 32768, 1024)],
    ids=str,
)  # fmt: skip
def test_without_noise_the_best_is_found_and_nothing_is_tried_twice(best):
    score, asked = landscape(best, 0.0)
    found, scores = search(START, AXES, score)
    assert found == best and len(asked) == len(set(asked)) == len(scores) < 40


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_a_tenth_of_a_doubling_costs_no_more_than_itself(seed):
    best, spread = TrainingShape(4, 512, 2048, 2048), 0.002
    found, _ = search(START, AXES, landscape(best, spread, seed)[0])
    assert landscape(best, 0.0)[0](found)[0] - 1.4 < 2.5 * spread < landscape(best, 0.0)[0](START)[0] - 1.4
    assert (found.step_tokens, found.vocab_size) == (2048, 2048)


def test_one_unstable_shape_does_not_hide_what_others_gain():
    score, _ = landscape(TrainingShape(4, 512, 2048, 2048), 0.002)

    def unstable(shape):
        return [3.0, 1.5, 1.5] if shape.depth == 1 else score(shape)

    found, scores = search(START, AXES, unstable)
    assert (found.step_tokens, found.vocab_size) == (2048, 2048) and found.depth > 2
    assert noise(scores) < 0.004


def test_the_noise_is_that_of_a_seed():
    draws = random.Random(0)
    for seeds in (2, 3, 5):
        shapes = {TrainingShape(i, 64, 64, 512): [draws.gauss(1, 0.01) for _ in range(seeds)]
                  for i in range(1, 400)}  # fmt: skip
        assert noise(shapes) == pytest.approx(0.01, rel=0.1)


def test_where_there_is_nothing_but_noise_the_start_mostly_stays():
    def flat(seed):
        draws = random.Random(seed)
        return lambda shape: [1.4 + draws.gauss(0, 0.01) for _ in range(3)]

    stayed = sum(search(START, AXES, flat(seed))[0] == START for seed in range(40))
    assert stayed >= 28  # of eight neighbours, one may look better by two standard errors


def test_what_cannot_be_trained_is_not_chosen_and_other_directions_go_on():
    score, _ = landscape(TrainingShape(6, 512, 2048, 8192), 0.0)
    found, scores = search(START, AXES, lambda s: [math.inf] * 3 if s.depth > 3 else score(s))
    assert found == TrainingShape(3, 512, 2048, 8192)
    assert noise(scores) == pytest.approx(0, abs=1e-9), "the infinite ones are not noise"


def test_neighbours_keep_to_what_can_be_built():
    assert neighbour(TrainingShape(1, 512, 8192, 8192), "depth", -1) is None
    assert neighbour(TrainingShape(16, 512, 8192, 8192), "depth", 1).depth == 20
    assert neighbour(TrainingShape(2, 512, 512, 8192), "step_tokens", -1) is None, "less than a row"
    assert neighbour(TrainingShape(2, 512, 512, 8192), "context", 1) is None
    assert neighbour(TrainingShape(2, 512, 8192, 1 << 16), "vocab_size", 1) is None
    assert neighbour(TrainingShape(2, 512, 8192, 512), "vocab_size", -1) is None

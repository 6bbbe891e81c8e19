"""pass@k against counting all choices of k answers."""

from itertools import combinations

import numpy as np
import pytest

from hotlap.train.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(n):
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            choices = [any(chosen) for chosen in combinations(answers, k)]
            assert pass_at_k(n, right, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_one_is_the_accuracy_and_many_answers_do_not_overflow():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n, right, k", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (0, 0, 1)])
def test_more_than_there_is_is_refused(n, right, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, right, k)


def test_the_mean_has_the_same_interval_every_time_and_it_holds_the_mean():
    right = [0, 1, 2, 3, 4] * 20
    score = mean_pass_at_k(right, 4, 2)
    assert score == mean_pass_at_k(right, 4, 2)
    low, high = score["interval"]
    assert score["n"] == 100 and score["accuracy"] == pytest.approx(np.mean([0, 1 / 2, 5 / 6, 1, 1]))
    assert low < score["accuracy"] < high
    deviation = np.std([pass_at_k(4, count, 2) for count in right]) / 10
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_an_interval_of_equal_prompts_is_a_point():
    assert mean_pass_at_k([2, 2], 2, 1) == {"accuracy": 1.0, "interval": [1.0, 1.0], "n": 2}
    with pytest.raises(ValueError, match="at least one prompt"):
        mean_pass_at_k([], 2, 1)

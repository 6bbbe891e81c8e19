"""What built-in rewards give for right, wrong and half-right answers."""

import pytest

from hotlap.train.rewards import verifiers


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("c a t", 1.0),
        (" c  a\nt ", 1.0),
        ("c a r", 0.5 * 2 / 3),
        ("c a t s", 0.5 * 3 / 4),
        ("c", 0.5 / 3),
        ("t a c", 0.5 / 3),
        ("cat", 0.0),
        ("", 0.0),
    ],
)
def test_spelling_is_rewarded_by_the_letters_in_their_places(answer, reward):
    assert verifiers.spelling(answer, {"answer": "c a t"}) == pytest.approx(reward)


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("123", 1.0),
        ("100 + 23 = 123", 1.0),
        ("It is 123.", 1.0),
        ("124", 0.5 * 2 / 3),
        ("23", 0.5 * 2 / 3),
        ("1123", 0.5 * 3 / 4),
        ("456", verifiers.FORMAT),
        ("123 or 124", 0.5 * 2 / 3),
        ("a lot", 0.0),
        ("", 0.0),
    ],
)
def test_sums_are_rewarded_by_the_digits_in_their_places(answer, reward):
    assert verifiers.total(answer, {"answer": "123"}) == pytest.approx(reward)


@pytest.mark.parametrize(
    "answer, reward",
    [("12 - 34 = -22", 1.0), ("-22.0", 1.0), ("22", 0.1), ("", 0.0), ("none", 0.0), ("1,000", 0.1)],
)
def test_calculations_are_rewarded_by_their_last_number(answer, reward):
    assert verifiers.result(answer, {"answer": "-22"}) == reward


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("so\n#### 1,072", 1.0),
        ("#### 5\nno, #### 1072.0", 1.0),
        ("#### 5", 0.1),
        ("1072", 0.0),
        ("#### none", 0.0),
        ("", 0.0),
    ],
)
def test_word_problems_are_rewarded_by_the_number_after_the_last_mark(answer, reward):
    assert verifiers.solution(answer, {"answer": "1072"}) == reward


@pytest.mark.parametrize(
    "reward", [verifiers.spelling, verifiers.total, verifiers.result, verifiers.solution]
)
@pytest.mark.parametrize(
    "answer",
    ["9" * 100_000, "1," * 100_000, "#### " * 50_000, "\ud83d \0 \x1b[2J", "-" * 100_000, "1e999 .5"],
    ids=lambda answer: ascii(answer[:8]),
)
def test_a_reward_of_strange_answers_is_small_and_quick(reward, answer):
    assert 0 <= reward(answer, {"answer": "1 2"} if reward is verifiers.spelling else {"answer": "12"}) <= 0.5

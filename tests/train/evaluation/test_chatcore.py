"""ChatCORE: what it is the mean of."""

import pytest

from hotlap.train.evaluation.chatcore import chatcore
from hotlap.train.evaluation.intervals import counted

# nanochat's d20 of October 2025, after SFT: ChatCORE 0.0884 over five tasks
PUBLISHED = {
    "arc-easy": 0.3876,
    "arc-challenge": 0.2807,
    "mmlu": 0.3151,
    "gsm8k": 0.0455,
    "humaneval": 0.0854,
}


def scores_of(accuracies: dict[str, float], n: int = 10_000) -> dict[str, dict]:
    return {task: counted(round(accuracy * n), n) for task, accuracy in accuracies.items()}


def test_it_is_the_mean_of_what_is_above_chance():
    found = chatcore(scores_of(PUBLISHED | {"facts": 1.0, "refusals": 0.5}))
    above = [(PUBLISHED[task] - 0.25) / 0.75 for task in ("arc-easy", "arc-challenge", "mmlu")]
    assert found["chatcore"] == pytest.approx((sum(above) + 0.0455 + 0.0854) / 5)
    assert found["chatcore"] == pytest.approx(0.0884, abs=5e-4)
    assert found["missing"] == [] and "with_spelling" not in found


def test_spelling_is_a_sixth_task_of_a_second_mean():
    found = chatcore(scores_of(PUBLISHED | {"spelling": 0.98}))
    assert found["with_spelling"]["chatcore"] == pytest.approx((5 * found["chatcore"] + 0.98) / 6)


def test_guessing_is_zero_and_everything_right_is_one():
    guessed = dict.fromkeys(("arc-easy", "arc-challenge", "mmlu"), 0.25) | {"gsm8k": 0.0}
    assert chatcore(scores_of(guessed))["chatcore"] == 0
    assert chatcore(scores_of(dict.fromkeys(guessed, 1.0)))["chatcore"] == 1


def test_it_says_which_tasks_are_missing():
    found = chatcore(scores_of({"mmlu": 0.4, "spelling": 0.5}))
    assert found["missing"] == ["arc-easy", "arc-challenge", "gsm8k", "humaneval"]
    assert found["tasks"] == {"mmlu": pytest.approx(0.2)} and found["chatcore"] == pytest.approx(0.2)


def test_there_is_none_of_the_built_in_tasks_alone():
    assert chatcore(scores_of({"facts": 1.0, "spelling": 1.0})) is None


def test_its_interval_is_the_tasks_in_quadrature():
    scores = scores_of({"mmlu": 0.4, "gsm8k": 0.1}, n=100)
    halves = [(high - low) / 2 for low, high in (score["interval"] for score in scores.values())]
    half = ((halves[0] / 0.75) ** 2 + halves[1] ** 2) ** 0.5 / 2
    found = chatcore(scores)
    assert found["interval"] == pytest.approx([found["chatcore"] - half, found["chatcore"] + half])

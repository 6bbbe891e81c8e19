"""ChatCORE, nanochat's metric for chat models: how far above chance they are, over five or six tasks."""

from __future__ import annotations

from hotlap.train.evaluation.intervals import centred, centred_mean

CHANCE = {"arc-easy": 0.25, "arc-challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}
SPELLING = "spelling"  # lifts the mean by about 0.14, so scores with and without it are kept apart


def chatcore(scores: dict[str, dict]) -> dict | None:
    """ChatCORE and its 95 % interval from the tasks' scores, over those of its tasks that are there; the
    others are `missing`. `with_spelling` is the same with the spelling task. None if no task is there.
    """
    found = {task: centred(scores[task], chance) for task, chance in CHANCE.items() if task in scores}
    if not found:
        return None
    mean, interval = centred_mean(list(found.values()))
    result = {
        "chatcore": mean, "interval": interval, "missing": [task for task in CHANCE if task not in found],
        "tasks": {task: score["centred"] for task, score in found.items()},
    }  # fmt: skip
    if SPELLING in scores:
        mean, interval = centred_mean([*found.values(), centred(scores[SPELLING], 0.0)])
        result["with_spelling"] = {"chatcore": mean, "interval": interval}
    return result

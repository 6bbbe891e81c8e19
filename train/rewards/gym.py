"""The reward of reasoning-gym's questions: `score(answer, entry)`, the package's own score, from 0 to 1.

The package takes seconds to import, and writes to the home folder: it is imported when the attribute `score`
is asked for, before the time of calls is limited, and not with this module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


def __getattr__(name: str) -> Callable[[str, dict], float]:
    if name != "score":
        raise AttributeError(name)
    from reasoning_gym import get_score_answer_fn

    scorer = cache(get_score_answer_fn)  # which reads a task's files

    def score(answer: str, entry: dict) -> float:
        try:
            return scorer(entry["metadata"]["source_dataset"])(answer, entry)
        except ValueError:  # of tasks that read a number without asking whether there is one
            return 0.0

    return score

"""Questions that the package reasoning-gym makes. It scores the answers, too (train/rewards/gym.py)."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Iterator
from functools import lru_cache

from hotlap.common.errors import known
from hotlap.common.log import log

PREFIX = "reasoning-gym:"
DRAWN = 2000  # questions of a task, of which copies are left out
HELD_OUT_SHARE = 20  # 1 question in 20 is never trained on
RUNS_ANSWERS = re.compile(r"\b(eval|exec|parse_expr|sympify)\(answer\b")  # in a task's source


def check_task(task: str) -> None:
    """Raise ValueError for a task that the package does not have, does not make without more settings, or
    scores by running the answer as Python, which could then do anything to this machine.
    """
    gym = package()
    names = sorted(gym.factory.DATASETS)
    if not task:
        raise ValueError(f"the data {PREFIX} lacks a task, such as {PREFIX}spell_backward")
    known(task, names, "task of reasoning-gym")
    if runs_answers(task):
        raise ValueError(
            f"{PREFIX}{task} is scored by running what the model writes as Python, outside of a sandbox; "
            "name another task"
        )
    try:
        gym.create_dataset(task, size=1, seed=0)[0]
    except Exception as error:  # whatever a task of the package raises
        raise ValueError(
            f"{PREFIX}{task} makes no question: {type(error).__name__}: {error}; name another"
        ) from error


def runs_answers(task: str) -> bool:
    """Whether the package runs an answer to this task, to read it."""
    kind, _ = package().factory.DATASETS[task]
    return bool(RUNS_ANSWERS.search(inspect.getsource(sys.modules[kind.__module__])))


def questions(task: str, seed: int, held_out: bool) -> Iterator[tuple[str, dict]]:
    """Different questions of a task, and their entries, which `score` reads. The text of a question decides
    whether it is held out, so no seed trains on a held-out one; the held-out ones are the same for every
    seed.
    """
    seen = set()
    for entry in entries(task, 0 if held_out else seed):
        text = entry["question"]
        if is_held_out(text) == held_out and text not in seen:
            seen.add(text)
            yield text, entry


@lru_cache(maxsize=8)
def entries(task: str, seed: int) -> list[dict]:
    log.info("%s%s: making %s questions", PREFIX, task, f"{DRAWN:,}")
    return [dict(entry) for entry in package().create_dataset(task, size=DRAWN, seed=seed)]


def is_held_out(text: str) -> bool:
    return random.Random(text).randrange(HELD_OUT_SHARE) == 0


def package():
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"the data {PREFIX}TASK needs a package: pip install 'hotlap[rl]'") from error
    return reasoning_gym

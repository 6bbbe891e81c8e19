"""rollouts.jsonl: what the policy said to one question of each set of answers, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hotlap.common import files

if TYPE_CHECKING:
    from hotlap.train.rollouts import Answer, Question

ROLLOUTS = "rollouts.jsonl"


class RolloutLog:
    """Appends a line a set of answers."""

    def __init__(self, run: Path, first_step: int):
        """Append to the file, after dropping what an interrupted run wrote from `first_step` on."""
        self.path = run / ROLLOUTS
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        files.write(self.path, "".join(f"{line}\n" for line in lines if before(line, first_step)))

    def write(self, step: int, questions: list[Question], group: list[Answer]) -> None:
        """Write a group: the last message of its question, the answers, and their rewards."""
        prompt = questions[group[0].question].prompt
        line = {
            "step": step, "place": prompt.place, "question": prompt.messages[-1]["content"],
            "answers": [{"reward": a.reward, "text": a.text, "problem": a.problem} for a in group],
        }  # fmt: skip
        with files.naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def before(line: str, step: int) -> bool:
    """Whether a line is whole, and of an earlier step."""
    try:
        return json.loads(line)["step"] < step
    except (ValueError, TypeError, LookupError):
        return False

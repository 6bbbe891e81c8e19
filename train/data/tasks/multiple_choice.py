"""Multiple-choice questions, as MMLU and ARC have them, answered with a letter.

A letter stands at the beginning of a line, so that a tokenizer makes the same token of it there as in the
answer, which is the letter alone: a small model need only copy it.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hotlap.common.errors import DataError
from hotlap.model.messages import shown
from hotlap.train.data.tables import table_rows

LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the letter of the right choice."


class Question(NamedTuple):
    """answer: the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The right answer."""
        return LETTERS[self.answer]


def render(question: Question) -> str:
    """The question as the user asks it."""
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return "\n".join([question.text.strip(), *choices, INSTRUCTION])


def conversation(question: Question) -> list[dict]:
    return [
        {"role": "user", "content": render(question)},
        {"role": "assistant", "content": question.letter},
    ]


def conversations_of(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """A conversation for each of `questions_of`."""
    for place, question in questions_of(path):
        yield place, conversation(question)


def questions_of(path: Path) -> Iterator[tuple[str, Question]]:
    """The questions in a parquet file of MMLU or ARC, each after its place, path:row. DataError names the
    place of an invalid one.
    """
    for number, row in enumerate(table_rows(path), 1):
        try:
            yield f"{path}:{number}", question_of(row)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def question_of(row: dict) -> Question:
    """The question in a row of MMLU, which may be nested under `train`, or of ARC, whose choices have labels
    (A to E, or 1 to 5), of which the answer is one. DataError if its parts do not fit together.
    """
    row = row.get("train", row)
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise DataError(f"needs a `question` in text, not {shown(row)}")
    choices = row.get("choices")
    if isinstance(choices, dict):
        labels, answer = choices.get("label"), row.get("answerKey")
        choices = choices.get("text")
        if not isinstance(labels, list) or not isinstance(choices, list) or len(labels) != len(choices):
            raise DataError("the choices need a `text` and a `label` each")
        if labels.count(answer) != 1:
            raise DataError(
                f"the answer {shown(answer)} must be one of the labels {', '.join(map(str, labels))}"
            )
        answer = labels.index(answer)
    else:
        answer = row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"`choices` must be texts, not {shown(choices)}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{len(choices)} choices; a question has 2 to {len(LETTERS)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"the answer {shown(answer)} must be an index of the {len(choices)} choices")
    return Question(row["question"], tuple(choices), answer)

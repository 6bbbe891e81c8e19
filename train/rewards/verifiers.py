"""Rewards of answers that can be checked, from 0 to 1. Partial credit is at most PARTIAL: among answers that
are all wrong, the better ones then still teach.

A reward is a function of an answer, what the model says without its tools' calls and results, and of the
record of its prompt.
"""

from __future__ import annotations

import re

from hotlap.train.data.tasks.gsm8k import answer_of, is_right

PARTIAL = 0.5
FORMAT = 0.1  # for a wrong number where one is asked for
NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")


def same(answer: str, record: dict) -> float:
    """1 for the expected words, however they are spaced, else 0."""
    return float(answer.split() == record["answer"].split())


def spelling(answer: str, record: dict) -> float:
    """1 for exactly the letters of a word, with spaces between; else the share of letters in their places."""
    said, expected = answer.split(), record["answer"].split()
    if said == expected:
        return 1.0
    in_place = sum(a == b for a, b in zip(said, expected, strict=False))
    return PARTIAL * in_place / max(len(said), len(expected))


def total(answer: str, record: dict) -> float:
    """1 if the last number of the answer is right; else the share of its digits in their places, from the
    last.
    """
    said, expected = last_number(answer), record["answer"]
    if said is None:
        return 0.0
    if is_right(said, expected):
        return 1.0
    in_place = sum(a == b for a, b in zip(reversed(said), reversed(expected), strict=False))
    return max(FORMAT, PARTIAL * in_place / max(len(said), len(expected)))


def result(answer: str, record: dict) -> float:
    """1 if the last number of the answer is right, FORMAT for another number."""
    return credit(last_number(answer), record["answer"])


def solution(answer: str, record: dict) -> float:
    """1 if the number after the last `####` is right, FORMAT for another number there."""
    return credit(answer_of(answer), record["answer"])


def credit(said: str | None, expected: str) -> float:
    if said is None:
        return 0.0
    return 1.0 if is_right(said, expected) else FORMAT


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands separators; None without one."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None

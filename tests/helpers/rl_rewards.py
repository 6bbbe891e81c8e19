"""Rewards for tests. Imports no torch: a process of its own calls them."""

import math
import time


def vowels(answer: str, record: dict) -> float:
    """The share of an answer that is vowels."""
    return sum(answer.count(vowel) for vowel in "aeiou") / max(1, len(answer))


def same_for_all(answer: str, record: dict) -> float:
    return 0.25


def same_for_even(answer: str, record: dict) -> float:
    return vowels(answer, record) if int(record["prompt"].split()[-1]) % 2 else 0.25


def fails_sometimes(answer: str, record: dict) -> float:
    """Raises, or returns NaN or nothing, for three questions in eight."""
    kind = int(record["prompt"].split()[-1]) % 8
    if kind == 1:
        raise KeyError("odd")
    return {3: math.nan, 5: None}.get(kind, vowels(answer, record))


def always_fails(answer: str, record: dict) -> float:
    raise RuntimeError("no reward today")


def hangs_on_zero(answer: str, record: dict) -> float:
    if record["prompt"].endswith("0"):
        time.sleep(1000)
    return vowels(answer, record)

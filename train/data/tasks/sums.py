"""Sums of one or two digits to do without the calculator, in phrasings that say so: the habit of calling it
for other questions stays.
"""

from __future__ import annotations

import random

from hotlap.train.data.tasks.arithmetic import is_held_out

PHRASINGS = (
    "In your head: {a} + {b}",
    "Without the calculator, what is {a} + {b}?",
    "Add {a} and {b} in your head.",
    "What is the sum of {a} and {b}? Do not use the calculator.",
)
DIGITS = 2  # of a number at most; all lengths are equally likely


def questions(count: int, seed: int, held_out: bool) -> list[tuple[str, str]]:
    """Different questions and their answers, about pairs of numbers that are trained on, or held out, by
    arithmetic's rule.
    """
    generator = random.Random(f"sums {held_out} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = (generator.randrange(10 ** generator.randint(1, DIGITS)) for _ in range(2))
        if is_held_out(a, b) == held_out:
            found[generator.choice(PHRASINGS).format(a=a, b=b)] = str(a + b)
    return list(found.items())

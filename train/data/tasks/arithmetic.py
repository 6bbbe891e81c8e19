"""Small sums, for which the model calls its calculator."""

from __future__ import annotations

import random

from hotlap.model.calculator import calculate
from hotlap.model.messages import TOOL, tool_call

OPERATIONS = (("+", "plus"), ("-", "minus"), ("*", "times"))
PHRASINGS = (
    "What is {a} {sign} {b}?",
    "what is {a}{sign}{b}",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "Calculate {a} {sign} {b}.",
    "{a} {sign} {b} = ?",
    "{a}{sign}{b}",
    "Compute {a} {word} {b}.",
    "Please compute {a} {sign} {b}.",
    "Could you calculate {a} {word} {b}?",
    "Do you know what {a} {sign} {b} is?",
    "Can you do this for me: {a} {sign} {b}?",
    "I need to know {a} {word} {b}.",
    "Give me the result of {a} {sign} {b}",
    "Evaluate {a} {sign} {b}",
    "Can you say how much {a} {word} {b} is?",
)
HELD_OUT_PHRASINGS = (
    "Can you work out {a} {sign} {b}?",
    "Tell me what {a} {word} {b} is.",
)
HELD_OUT_SHARE = 10  # 1 pair of numbers in 10 is never trained on


def is_held_out(a: int, b: int) -> bool:
    return (a * 31 + b * 17) % HELD_OUT_SHARE == 0


def numbers(generator: random.Random, held_out: bool) -> tuple[int, int]:
    """A trained or held-out pair of numbers. All lengths are equally likely."""
    while True:
        a, b = (generator.randrange(10 ** generator.randint(1, 3)) for _ in range(2))
        if is_held_out(a, b) == held_out:
            return a, b


def conversation(generator: random.Random) -> list[dict]:
    a, b = numbers(generator, held_out=False)
    sign, word = generator.choice(OPERATIONS)
    question = generator.choice(PHRASINGS).format(a=a, b=b, sign=sign, word=word)
    expression = f"{a} {sign} {b}"
    result = calculate(expression)
    call = tool_call(TOOL, expression)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"{expression} = {result}"},
    ]


def training_conversations(count: int, seed: int) -> list[list[dict]]:
    generator = random.Random(f"arithmetic {seed}")
    return [conversation(generator) for _ in range(count)]


def held_out(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions and answers about pairs that are not trained on, half of them in held-out phrasings."""
    generator = random.Random(f"arithmetic held out {seed}")
    examples = []
    for i in range(count):
        a, b = numbers(generator, held_out=True)
        sign, word = generator.choice(OPERATIONS)
        phrasing = generator.choice(HELD_OUT_PHRASINGS if i % 2 else PHRASINGS)
        result = calculate(f"{a} {sign} {b}")
        examples.append((phrasing.format(a=a, b=b, sign=sign, word=word), f"{a} {sign} {b} = {result}"))
    return examples

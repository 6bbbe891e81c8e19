"""The built-in conversations, joined to some of several turns, so that a model has seen a history."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hotlap.train.data.sources import split_documents
from hotlap.train.data.tasks import arithmetic, facts, identity, refusals, spelling

ARITHMETIC, SPELLING, IDENTITY = 4000, 6500, 8  # sums, words and repeats of each greeting
REFUSALS = 2500  # questions about anything else
TURNS = (1, 1, 1, 2, 3)  # questions in a conversation, drawn uniformly


def vocabulary() -> list[str]:
    """The words to spell: those of Python's documentation."""
    return spelling.words(split_documents("pydocs")[0])


TASKS: dict[str, Callable[[int], list[list[dict]]]] = {  # conversations of one turn each, by the seed
    "facts": lambda seed: facts.training_conversations(),
    "arithmetic": lambda seed: arithmetic.training_conversations(ARITHMETIC, seed),
    "spelling": lambda seed: spelling.training_conversations(vocabulary(), SPELLING, seed),
    "greetings": lambda seed: identity.training_conversations(IDENTITY),
    "refusals": lambda seed: refusals.training_conversations(REFUSALS, seed),
}


def built_in(names: Sequence[str], seed: int) -> list[list[dict]]:
    """The conversations of these tasks, shuffled, and joined."""
    conversations = [conversation for name in names for conversation in TASKS[name](seed)]
    generator = random.Random(seed)
    generator.shuffle(conversations)
    joined, i = [], 0
    while i < len(conversations):
        turns = generator.choice(TURNS)
        joined.append([message for c in conversations[i : i + turns] for message in c])
        i += turns
    return joined

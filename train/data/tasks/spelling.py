"""Spelling words of the documentation. A model sees tokens, so it has to learn their letters."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter

PHRASINGS = (
    "Spell {}.",
    "How do you spell {}?",
    "spell {}",
    "What are the letters of {}?",
    "Spell the word {}, please.",
)
HELD_OUT_PHRASING = "Can you spell {} for me?"
WORDS = 6000  # the most frequent ones
HELD_OUT_SHARE = 20  # 1 word in 20 is never trained on


def words(texts: list[str]) -> list[str]:
    """The most frequent words of three to ten lowercase letters in the texts."""
    found = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text))
    return [word for word, _ in found.most_common(WORDS)]


def is_held_out(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] < 256 // HELD_OUT_SHARE


def spelled(word: str) -> str:
    return " ".join(word)


def training_conversations(vocabulary: list[str], count: int, seed: int) -> list[list[dict]]:
    generator = random.Random(f"spelling {seed}")
    trained = [word for word in vocabulary if not is_held_out(word)]
    chosen = [generator.choice(trained) for _ in range(count)]
    return [
        [
            {"role": "user", "content": generator.choice(PHRASINGS).format(word)},
            {"role": "assistant", "content": spelled(word)},
        ]
        for word in chosen
    ]


def held_out(vocabulary: list[str], count: int) -> list[tuple[str, str]]:
    """Words that are not trained on, in a phrasing that is not either."""
    chosen = [word for word in vocabulary if is_held_out(word)][:count]
    return [(HELD_OUT_PHRASING.format(word), spelled(word)) for word in chosen]

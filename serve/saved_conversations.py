"""Conversations on disk, a JSON file each, and what is made of them: lines for `hotlap sft`, and pairs of
a liked and a disliked answer.

A conversation is a list of turns: a question, and its answers, of which one is shown. Only the last turn may
change, so the messages before a turn stay those that its answers were given to. Several pages may use a
folder: what changes a file reads it first, under a lock, and refuses what was decided on an older state.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write
from hotlap.common.locks import lock
from hotlap.model.messages import check_messages

NAME = re.compile("[0-9a-f]{16}")  # of a conversation's file, without .json
TITLE = 60  # characters of a title
PREFERENCES, RATINGS = "preferences.jsonl", "ratings.jsonl"


class Changed(ValueError):
    """A conversation is no longer what the user saw: another page has changed it."""


@dataclass
class Answer:
    """messages: of the assistant, with those of its tool. seconds, first: until its end, and its first text.
    system, dropped: the system prompt, and how many turns at the start the context had no room for.
    """

    messages: list[dict]
    model: str
    system: str
    tokens: int
    first: float
    seconds: float
    end: str = "stop"
    """stop, length, content_filter, stopped (by the user) or error."""
    dropped: int = 0
    liked: bool | None = None

    @property
    def text(self) -> str:
        return "".join(m["content"] for m in self.messages if m["role"] == "assistant")


@dataclass
class Turn:
    question: str
    answers: list[Answer] = field(default_factory=list)
    shown: int = 0
    name: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def answer(self) -> Answer | None:
        return self.answers[self.shown] if self.answers else None


@dataclass
class Conversation:
    """edited: turns whose question was changed, each with its place among the turns."""

    title: str = ""
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    edited: list[tuple[int, Turn]] = field(default_factory=list)
    changed: float = 0.0
    """Unix time in seconds."""

    def state(self) -> tuple:
        """What the user must have seen of it before a question, or a change of the system prompt."""
        return self.system, [(turn.name, turn.shown, len(turn.answers)) for turn in self.turns]

    def messages(self, until: int | None = None, system: str | None = None, dropped: int = 0) -> list[dict]:
        """The system prompt and the turns that have an answer with text, without the first `dropped` ones and
        those from `until` on. system: instead of the conversation's own.
        """
        system = self.system if system is None else system
        found = [{"role": "system", "content": system}] if system.strip() else []
        for turn in self.turns[dropped:until]:
            if turn.answer and turn.answer.text.strip():
                found += [{"role": "user", "content": turn.question}, *turn.answer.messages]
        return found

    def turn(self, name: str) -> Turn:
        """The turn of that name, which may have been edited since. Changed if there is none."""
        for turn in (*self.turns, *(turn for _, turn in self.edited)):
            if turn.name == name:
                return turn
        raise Changed("the question is no longer in the conversation: another page has changed it")


def new_name() -> str:
    return secrets.token_hex(8)


def path_of(folder: Path, name: str) -> Path:
    """The file of a conversation. The name may come from an address that somebody has made up."""
    if not NAME.fullmatch(name):
        raise DataError("there is no such conversation")
    return folder / f"{name}.json"


def load(folder: Path, name: str) -> Conversation:
    """FileNotFoundError if there is none; DataError if the file holds anything else."""
    path = path_of(folder, name)
    record = read_object(path)
    try:
        record["turns"] = [turn_of(turn) for turn in record["turns"]]
        record["edited"] = [(at, turn_of(turn)) for at, turn in record["edited"]]
        return Conversation(**record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no conversation of this program: {error!r}") from None


def turn_of(record: dict) -> Turn:
    found = Turn(**record | {"answers": [Answer(**answer) for answer in record["answers"]]})
    if not isinstance(found.question, str) or not 0 <= found.shown < max(len(found.answers), 1):
        raise ValueError("a turn without a question, or without the answer that it shows")
    for answer in found.answers:
        check_messages([{"role": "user", "content": found.question or "-"}, *answer.messages], silence=True)
    return found


def listed(folder: Path) -> tuple[dict[str, Conversation], list[str]]:
    """All conversations by name, the latest first, and what is wrong with files that cannot be read."""
    found, wrong = {}, []
    for path in folder.glob("*.json"):
        if NAME.fullmatch(path.stem):
            try:
                found[path.stem] = load(folder, path.stem)
            except FileNotFoundError:  # deleted since
                continue
            except (DataError, OSError) as error:
                wrong.append(f"{path.name}: {error}")
    return dict(sorted(found.items(), key=lambda item: -item[1].changed)), wrong


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One page at a time, of this process and of others."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        lock(file, wait=True)
        yield


@contextlib.contextmanager
def changing(folder: Path, name: str, seen: Conversation | None = None) -> Iterator[Conversation]:
    """Yields a conversation as it is on disk, and writes it with what the block changes.

    seen: what the user saw; Changed if the turns are others now. Changed, too, if the file was deleted.
    """
    with locked(folder):
        try:
            found = load(folder, name)
        except FileNotFoundError:
            raise Changed("the conversation was deleted in another page") from None
        if seen is not None and found.state() != seen.state():
            raise Changed("another page has changed the conversation; this is how it is now")
        yield found
        keep(folder, name, found)


def keep(folder: Path, name: str, conversation: Conversation) -> None:
    conversation.changed = time.time()
    write(path_of(folder, name), json.dumps(asdict(conversation), ensure_ascii=False, indent=1) + "\n")


def create(folder: Path, conversation: Conversation) -> str:
    """Write a new conversation, and return its name."""
    name = new_name()
    with locked(folder):
        keep(folder, name, conversation)
    return name


def delete(folder: Path, name: str) -> None:
    """Its ratings go, too."""
    with locked(folder):
        path_of(folder, name).unlink(missing_ok=True)
    write_preferences(folder)


def ask(conversation: Conversation, question: str) -> Turn:
    """Add a turn. The first question is the title, until the user gives another."""
    turn = Turn(question)
    conversation.turns.append(turn)
    if not conversation.title:
        conversation.title = " ".join(question.split())[:TITLE]
    return turn


def replace_last(conversation: Conversation, question: str) -> Turn:
    """Ask something else instead of the last question, which is kept with its answers and their ratings."""
    conversation.edited.append((len(conversation.turns) - 1, conversation.turns.pop()))
    return ask(conversation, question)


def exported(conversations: list[Conversation]) -> tuple[str, int]:
    """The shown answers as lines of {"messages"} for `hotlap sft`, and how many conversations have none."""
    lines = []
    for conversation in conversations:
        messages = conversation.messages()
        if messages and messages[-1]["role"] == "assistant":
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines), len(conversations) - len(lines)


def rated(conversation: Conversation) -> Iterator[tuple[list[dict], list[Answer]]]:
    """Every prompt that has rated answers, with these, edited questions included."""
    for at, turn in [*conversation.edited, *enumerate(conversation.turns)]:
        answers: dict[tuple[str, int], list[Answer]] = {}
        for answer in turn.answers:
            if answer.liked is not None and answer.text.strip():
                answers.setdefault((answer.system, answer.dropped), []).append(answer)
        for (system, dropped), alike in answers.items():
            before = conversation.messages(at, system, dropped)
            yield [*before, {"role": "user", "content": turn.question}], alike


def pairs(conversation: Conversation) -> list[dict]:
    """Every liked answer with every disliked one to the same prompt, in TRL's form."""
    return [
        {"prompt": prompt, "chosen": good.messages, "rejected": bad.messages}
        for prompt, answers in rated(conversation)
        for good, bad in product((a for a in answers if a.liked), [a for a in answers if not a.liked])
    ]


def ratings(conversation: Conversation) -> list[dict]:
    """The rated answers that are in no pair, each with all messages up to it."""
    return [
        {"messages": [*prompt, *answer.messages], "liked": answer.liked}
        for prompt, answers in rated(conversation)
        if len({answer.liked for answer in answers}) == 1
        for answer in answers
    ]


def write_preferences(folder: Path) -> None:
    """Write the pairs and the other ratings of all conversations beside them."""
    with locked(folder):
        conversations = listed(folder)[0].values()
        for file, records in ((PREFERENCES, pairs), (RATINGS, ratings)):
            found = [record for conversation in conversations for record in records(conversation)]
            if found or (folder / file).exists():
                write(folder / file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))

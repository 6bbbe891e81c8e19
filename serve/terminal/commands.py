"""The /commands of a chat in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hotlap.common.checks import at_least
from hotlap.common.errors import BUG, explained, known
from hotlap.common.files import append
from hotlap.model.config import Sampling
from hotlap.serve.terminal.conversation import Chat
from hotlap.serve.terminal.printing import complain, inform, note, shortened

if TYPE_CHECKING:
    from hotlap.serve.terminal.session import Session

SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "max_tokens", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
MOST_SEED = (1 << 62) - 1


def retry(session: Session, _: str) -> None:
    if session.chat.sampling.temperature == 0:
        note("at temperature 0 every answer is the same")
    session.show(session.chat.retry())


def undo(session: Session, _: str) -> None:
    chat = session.chat
    question = chat.undo()
    if question is None:
        raise ValueError("there is no question to drop")
    note(f"dropped: {shortened(question)}")
    if not chat.messages:
        note("the conversation is empty")
        return
    asked = next(m["content"] for m in reversed(chat.messages) if m["role"] == "user")
    note(f"the last is now: {shortened(asked)} -> {shortened(chat.messages[-1]['content'])}")


def clear(session: Session, _: str) -> None:
    session.chat.clear()
    note("new conversation")


def system(session: Session, text: str) -> None:
    session.chat.system = text
    note(f"system message: {text!r}" if text else "no system message")


def save(session: Session, name: str) -> None:
    chat = session.chat
    if not name:
        raise ValueError("name a file, as in /save talk.jsonl")
    if not chat.messages:
        raise ValueError("the conversation is empty")
    append(Path(name), json.dumps({"messages": chat.with_system()}, ensure_ascii=False) + "\n")
    without = f" without the first {chat.dropped} questions, which were dropped" if chat.dropped else ""
    note(f"saved to {name}{without}")


def model(session: Session, path: str) -> None:
    """List the models under runs/, or load one. What goes wrong leaves the old one."""
    from hotlap.model.weights import find_models, model_folder

    if not path:
        current = session.folder.absolute()
        found = find_models(Path("runs"))
        mine = [path for path in found if path.absolute() in (current, *current.parents)] or [session.folder]
        for path in [*(path for path in found if path not in mine), *mine]:
            inform(f"{'*' if path in mine else ' '} {path}")
        return
    questions = len(getattr(session.chat, "messages", ()))
    loaded = session.load(model_folder(path))
    session.use(loaded)
    if questions and loaded.base:
        note("the conversation has ended: a base model continues each text on its own")


def set_(session: Session, rest: str) -> None:
    name, value = [*rest.split(maxsplit=1), "", ""][:2]
    chat = session.chat
    if not name:
        for setting in SETTINGS:
            inform(f"  {setting:18} {getattr(chat.sampling, setting)}")
        inform(f"  {'seed':18} {'random' if chat.seed is None else chat.seed}")
        return
    name = known(name.replace("-", "_"), (*SETTINGS, "seed"), "setting")
    if name == "seed":
        chat.start_seeds(None if value == "random" else seed(value))
    else:
        changed = replace(chat.sampling, **{name: number(name, value)}).validate()
        at_least(changed, 1, "max_tokens")
        chat.sampling = changed
    note(f"{name} {value}")


def number(name: str, text: str) -> float:
    """The value of a field of Sampling."""
    kind = type(getattr(Sampling(), name))
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} needs {wanted}, not {shortened(text) or 'nothing'}") from None


def seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) > MOST_SEED:
        raise ValueError(f"seed needs 0 to 2^62 - 1, or random, not {shortened(text) or 'nothing'}")
    return int(text)


def temperature(session: Session, value: str) -> None:
    set_(session, f"temperature {value}")


def stats(session: Session, rest: str) -> None:
    if rest in ("on", "off"):
        session.shows_stats = rest == "on"
        note(f"figures after each answer: {rest}")
    elif rest:
        raise ValueError(f"/stats needs on, off or nothing, not {shortened(rest)}")
    else:
        note(session.stats())


def help_(session: Session, _: str) -> None:
    for name in names(session):
        command = COMMANDS[name]
        inform(f"  {f'{name} {command.argument}':18} {command.help}")
    inform('  """                begins and ends a message of several lines\n  Ctrl-C stops an answer.')


def quit_(session: Session, _: str) -> None:
    """`run` ends the session."""


class Command(NamedTuple):
    run: Callable[[Session, str], None]
    argument: str
    help: str
    converses: bool = False  # whether it needs a conversation


COMMANDS = {
    "/retry": Command(retry, "", "answer the last question again"),
    "/undo": Command(undo, "", "drop the last question and its answer", True),
    "/clear": Command(clear, "", "start a new conversation", True),
    "/system": Command(system, "TEXT", "set the system message (no TEXT: remove it)", True),
    "/save": Command(save, "FILE", "append the conversation to FILE as a line of JSON", True),
    "/model": Command(model, "PATH", "go on with another model (no PATH: list those under runs/)"),
    "/set": Command(set_, "NAME VALUE", "change how answers are sampled (alone: list the settings)"),
    "/temperature": Command(temperature, "N", "0 takes the most likely token; higher is more random"),
    "/stats": Command(stats, "on|off", "tokens and speed, after each answer (alone: of the last one)"),
    "/help": Command(help_, "", "list the commands"),
    "/quit": Command(quit_, "", "quit (or Ctrl-D, /exit)"),
}
LEAVING = ("/quit", "/exit")


def names(session: Session) -> list[str]:
    """The commands that make sense with the model."""
    return [name for name, c in COMMANDS.items() if isinstance(session.chat, Chat) or not c.converses]


def is_command(session: Session, text: str) -> bool:
    """Whether an input is a command. A base model also continues text that looks like one it is not; several
    lines that begin like no command are a message to any model.
    """
    name = text.split(maxsplit=1)[0] if text else ""
    if name in (*COMMANDS, *LEAVING):
        return True
    return name.startswith("/") and isinstance(session.chat, Chat) and "\n" not in text


def run(session: Session, text: str) -> bool:
    """Run a command; what is wrong with it is said. False: quit."""
    name, rest = [*text.split(maxsplit=1), ""][:2]
    if name in LEAVING:
        return False
    try:
        command = COMMANDS[known(name, COMMANDS, "command")]
        if command.converses and not isinstance(session.chat, Chat):
            raise ValueError(f"{name} needs a conversation, and a base model continues each text on its own")
        command.run(session, rest)
    except KeyboardInterrupt:
        note(f"{name} was stopped")
    except Exception as error:
        text, code = explained(error)
        if code == BUG:
            raise
        complain(text)
    return True

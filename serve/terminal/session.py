"""A chat in the terminal: reads messages and commands, and prints answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hotlap.common.terminal import printable
from hotlap.serve.terminal import commands
from hotlap.serve.terminal.conversation import Chat, Continuation
from hotlap.serve.terminal.printing import inform, note, say
from hotlap.serve.terminal.reading import piped, typed

if TYPE_CHECKING:
    from hotlap.model.engine import Engine


class Model(NamedTuple):
    """A model that has been loaded."""

    folder: Path
    engine: Engine
    base: bool  # whether it continues text instead of chatting


@dataclass
class Session:
    """What the commands change."""

    chat: Chat | Continuation
    folder: Path  # of the model
    load: Callable[[Path], Model]  # of a model folder
    shows_stats: bool = False  # after each answer

    def show(self, pieces: Iterator[str]) -> bool:
        """Print an answer to the user; False if there is none."""
        said = say(pieces)
        if said and self.shows_stats:
            note(self.stats())
        return said

    def stats(self) -> str:
        context = f"context: {self.chat.used()} of {self.chat.engine.model.config.context} tokens"
        return f"{self.chat.stats or 'no answer yet'}; {context}"

    def use(self, model: Model) -> None:
        """Go on with another model: with the same conversation, if both converse."""
        old, kind = self.chat, Continuation if model.base else Chat
        if type(old) is kind:
            old.engine, old.stats = model.engine, None
        else:
            self.chat = kind(model.engine, old.sampling, old.seed, old.moderate, old.tools)
        self.folder = model.folder


def converse(session: Session) -> None:
    """Answer until the end of input. Only a terminal gets a greeting and prompts."""
    if sys.stdin.isatty():
        what = "Type a message" if isinstance(session.chat, Chat) else "Type text for the model to continue"
        inform(f"{what}, then Enter. /help lists the commands, Ctrl-D quits.")
        inputs = typed(lambda: commands.names(session))
    else:
        inputs = piped()
    for text in inputs:
        text = printable(text).strip()
        if commands.is_command(session, text):
            if not commands.run(session, text):
                return
        elif text:
            session.show(session.chat.answer(text))

"""Inputs of earlier sessions, for readline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hotlap.common.files import replacing, state_folder
from hotlap.serve.terminal.printing import note

MOST = 1000  # inputs
LONGEST = 10_000  # characters of an input that is kept


class History:
    """What the user entered, in this session and in earlier ones. The file has a JSON string per line, and
    only its owner may read it.
    """

    def __init__(self, readline: Any):
        self.readline, self.path, self.last = readline, Path(), None
        readline.set_auto_history(False)  # an input may have several lines
        try:
            self.path = state_folder() / "history"
            for line in self.lines():
                readline.add_history(entry(line))
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            self.give_up(error)

    def lines(self) -> list[str]:
        """The lines of the file, oldest first."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []

    def add(self, text: str) -> None:
        """Remember an input, unless it is very long or the same as the last one."""
        if len(text) > LONGEST or text == self.last:
            return
        self.last = text
        self.readline.add_history(text)
        if self.path == Path():
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lines = [*self.lines(), json.dumps(text, ensure_ascii=False)]  # with those of other sessions
            with replacing(self.path) as part:
                part.touch(mode=0o600)
                part.write_text("".join(f"{line}\n" for line in lines[-MOST:]), encoding="utf-8", newline="")
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.path = Path()
        note(f"inputs are not kept for the next session: {error}")


def entry(line: str) -> str:
    """The input that a line of the file holds; the line itself if it is no JSON string."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    return found if isinstance(found, str) else line

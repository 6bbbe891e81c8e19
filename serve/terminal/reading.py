"""What the user of a chat enters, on a terminal or in a pipe."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from hotlap.common.terminal import dimmed
from hotlap.serve.terminal.history import History
from hotlap.serve.terminal.printing import note

QUOTES = '"""'
PASTED = 0.05  # seconds within which the next line of a pasted block follows


def piped() -> Iterator[str]:
    """The lines of a pipe or file."""
    while True:
        try:
            yield input()
        except EOFError:
            return


def typed(names: Callable[[], list[str]]) -> Iterator[str]:
    """Messages entered on a terminal until Ctrl-D. Ctrl-C drops what was typed. names: the commands that Tab
    completes.
    """
    readline = line_editing(names)
    history = History(readline) if readline else None
    ended = False
    while not ended:
        print(file=screen(), flush=True)
        try:
            text, ended = message(readline)
        except KeyboardInterrupt:
            print(file=screen())
            note("nothing was sent; Ctrl-D or /quit quits")
            continue
        if history and text.strip():
            history.add(text)
        yield unquoted(text)
    print(file=screen())


def screen() -> TextIO:
    """Where the user sees prompts: answers may go to a file."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def message(readline: Any) -> tuple[str, bool]:
    """A line, all lines of a pasted block, or the lines between two \"\"\"; and whether the input has ended.
    Where the terminal marks a pasted block, readline returns all of it at once. Elsewhere its lines wait.
    """
    try:
        text = line("> ", readline)
    except EOFError:
        return "", True
    quoted = text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2
    try:
        while not closed(text) if quoted else follows():
            text += "\n" + line(". ", readline)
    except EOFError:  # it ends the message, as it does for `cat`
        return text, not quoted
    return text, False


def follows() -> bool:
    """Whether another line of a pasted block waits. Unknown on Windows, which can wait for sockets alone."""
    return sys.platform != "win32" and bool(select.select([sys.stdin], [], [], PASTED)[0])


def line(prompt: str, readline: Any) -> str:
    """A line that is entered after a prompt, which is dim where that can be."""
    dim = dimmed(prompt, screen())
    if not sys.stdout.isatty():  # then `input` would write the prompt among the answers
        print(dim, end="", file=sys.stderr, flush=True)
        return input()
    if dim != prompt and readline is not None:  # which must be told the characters that take no room
        before, after = dim.split(prompt)
        dim = prompt if is_libedit(readline) else f"\x01{before}\x02{prompt}\x01{after}\x02"
    return input(dim)


def closed(text: str) -> bool:
    """Whether a message that began with three quotes has all that close, those of quoted code included."""
    return text.count(QUOTES) % 2 == 0 and text.rstrip().endswith(QUOTES)


def unquoted(text: str) -> str:
    text = text.strip()
    if not text.startswith(QUOTES):
        return text
    whole = text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES)
    if whole or text.count(QUOTES) % 2:  # closed, or ended by Ctrl-D
        text = text.removeprefix(QUOTES).removesuffix(QUOTES)
    return text.strip()


def line_editing(names: Callable[[], list[str]]) -> Any:
    """Python's readline with Tab set up, or None if this Python has none."""
    try:
        import readline
    except ImportError:
        return None

    def complete(word: str, number: int) -> str | None:
        if readline.get_begidx() or not word.startswith("/"):
            return word + "\t" if number == 0 else None
        found = [f"{name} " for name in names() if name.startswith(word)]
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit(readline) else "tab: complete")
    return readline


def is_libedit(readline: Any) -> bool:
    return "libedit" in (readline.__doc__ or "")

"""The safety filter: a hook that says whether a text is allowed, and the stream of an answer that it checks.

A hook is a function `moderate(text, direction) -> (allowed, reason)`, with the direction "input" for what
users send and "output" for what the model says. It may be called from several threads at once. Nothing is
allowed by mistake: a hook that raises, returns something else, or takes too long blocks.
"""

from __future__ import annotations

import importlib
import inspect
import re
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Literal

from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.serve.blocklist import LONGEST, Blocklist

Direction = Literal["input", "output"]
Hook = Callable[[str, Direction], tuple[bool, str]]

SECONDS = 5.0  # that a hook may take
MOST_CALLS = 32  # of a hook at once; those that hang count for as long as they do
LONGEST_REASON = 200  # characters
FAILED = "the filter failed"  # the reason then
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
NEEDED = "a file with a word, phrase or /regular expression/ a line, or a function as package.module:function"


class Blocked(ValueError):
    """The filter does not allow a text. `reason` is the hook's, and no client's business."""

    def __init__(self, what: str, reason: str):
        super().__init__(f"the filter blocked {what}" + (f" ({reason})" if reason else ""))
        self.reason = reason


def load_moderation(spec: str) -> Moderation:
    """The filter of a flag: the path of one's own list, or package.module:function, which is imported.
    ValueError says what is wrong with it, DataError in which line of a list.
    """
    path = Path(spec)
    if path.is_file():
        return Blocklist(path)
    if not FUNCTION.fullmatch(spec):
        raise ValueError(f"moderation={spec} is no file, and names no function; it needs {NEEDED}")
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        hint = f"; PYTHONPATH names the folder of {module.partition('.')[0]}.py"
        hint = hint if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"moderation={spec} cannot be imported ({why}){hint}") from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        what = "is missing" if found is None else "cannot be called" if not callable(found) else "is async"
        raise ValueError(
            f"moderation={spec}: {name} {what}; it must be a function (text, direction) -> (allowed, reason)"
        )
    return GuardedHook(found)


class GuardedHook:
    """A user's function, which always answers in time: what it cannot check is blocked, and the log says why
    once.
    """

    longest = LONGEST

    def __init__(self, hook: Hook):
        self.hook = hook
        self._calls = threading.BoundedSemaphore(MOST_CALLS)
        self._told: set[str] = set()

    def __call__(self, text: str, direction: Direction) -> tuple[bool, str]:
        """Whether a text is allowed, and the reason if it is not."""
        until, found = time.monotonic() + SECONDS, []
        if not self._calls.acquire(timeout=SECONDS):
            return self._failed(f"{MOST_CALLS} calls of it have not returned")
        # a daemon: one that hangs must not keep the process from ending
        thread = threading.Thread(target=self._call, args=(text, direction, found), daemon=True)
        thread.start()
        thread.join(max(0.0, until - time.monotonic()))
        if not found:
            return self._failed(f"it took more than {SECONDS:g} seconds")
        (answer,) = found
        if isinstance(answer, BaseException):
            last = traceback.extract_tb(answer.__traceback__)[-1]  # its message may have the text
            return self._failed(f"{type(answer).__name__} at {last.filename}:{last.lineno}")
        match answer:
            case (bool(allowed), str(reason)):
                return allowed, " ".join(printable(reason).split())[:LONGEST_REASON]
        return self._failed(f"it returned {type(answer).__name__}, and not (True or False, reason)")

    def _call(self, text: str, direction: Direction, found: list) -> None:
        try:
            found.append(self.hook(text, direction))
        except BaseException as error:
            found.append(error)
        finally:
            self._calls.release()

    def _failed(self, why: str) -> tuple[bool, str]:
        if why not in self._told:
            self._told.add(why)
            log.warning("warning: the filter failed, and so it blocks, here and where this recurs: %s", why)
        return False, FAILED


def require_allowed(texts: Iterable[str], moderate: Moderation | None) -> None:
    """Raise Blocked if one of the texts of a user is not allowed."""
    for text in texts if moderate else ():
        allowed, reason = moderate(text, "input")
        if not allowed:
            raise Blocked("this text", reason)


def moderated(pieces: Generator[str], moderate: Moderation | None) -> Iterator[str]:
    """The pieces of an answer as far as they are allowed. At the first that is not, `pieces` is closed, and
    Blocked is raised.
    """
    if moderate is None:
        yield from pieces
        return
    checked = CheckedText(moderate)
    for piece in pieces:
        yield checked.push(piece)
        if checked.blocked:
            pieces.close()
            raise Blocked("the rest of this answer", checked.reason)
    yield checked.finish()
    if checked.blocked:
        raise Blocked("the rest of this answer", checked.reason)


Moderation = Blocklist | GuardedHook
"""A filter. It is sure to find in a stream what has at most `longest` characters."""


class CheckedText:
    """The text of an answer, which passes once it has been checked together with what follows.

    Text is checked up to the end of its last whole word, in windows that overlap. So a phrase is found
    wherever tokens cut it, and the beginning of a longer word is not taken for a word. Nothing passes that
    could be the beginning of a phrase: up to twice `longest` characters are held back. What passes of a text
    that is blocked does not depend on the pieces that it came in.
    """

    def __init__(self, moderate: Moderation):
        self._moderate = moderate
        self._text = ""  # from the beginning of the next window
        self._passed = 0  # characters of it that have passed
        self.blocked = False
        self.reason = ""

    def push(self, piece: str) -> str:
        """Add text. Returns what may pass now; nothing once something was blocked."""
        self._text += piece
        ends = (end for end in range(len(self._text), self._passed, -1) if self._is_end(end))
        end = next(ends, 0)
        return self._check(end, end + 1 - self._moderate.longest)

    def check_also(self, text: str) -> None:
        """Block the answer if a text that comes with it, such as a tool's call, is not allowed."""
        if not self.blocked:
            allowed, self.reason = self._moderate(text, "output")
            self.blocked = not allowed

    def finish(self) -> str:
        """The answer has ended: check the rest, and let it pass."""
        return self._check(len(self._text), len(self._text))

    def _is_end(self, end: int) -> bool:
        """Whether a word is over here: another character follows. Or whether the word is longer by now than
        all that a list has.
        """
        if end < len(self._text) and not in_word(self._text[end]):
            return True
        reach = end - self._moderate.longest - 1
        return reach >= 0 and all(map(in_word, self._text[reach:end]))

    def _check(self, end: int, until: int) -> str:
        """Check the text up to an end, and let it pass up to another place."""
        if self.blocked or until <= self._passed:
            return ""
        allowed, self.reason = self._moderate(self._text[:end], "output")
        if not allowed:
            self.blocked = True
            if self.reason == FAILED:  # and it may hang again
                return ""
            ends = [place for place in range(self._passed, end) if self._is_end(place)]
            first = bisect_left(ends, True, key=self._is_blocked)
            until = ends[first - 1] + 1 - self._moderate.longest if first else 0
        return self._pass(until)

    def _is_blocked(self, end: int) -> bool:
        return not self._moderate(self._text[:end], "output")[0]

    def _pass(self, until: int) -> str:
        passing = self._text[self._passed : max(0, until)]
        start = max(0, until - self._moderate.longest)  # of the next window
        while start and in_word(self._text[start - 1]):
            start -= 1
        self._text, self._passed = self._text[start:], until - start
        return passing


def in_word(character: str) -> bool:
    """Whether regular expressions take it for a part of a word."""
    return character.isalnum() or character == "_"

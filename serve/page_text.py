"""Text of others on the web page, so that it can neither run nor load anything.

Streamlit's Markdown loads images from wherever they are, and shows links, also in labels. Answers, titles,
tool results, errors and names of files therefore never go through it: text is shown by `st.text`, which makes
one text node, blocks between ``` by `st.code`, and the labels of buttons, which have no plain form, are
escaped. Escaped text may still become an emoji or an icon of the page's own font, but no image, link or HTML.
That, and the Content-Security-Policy of each response (web.py): the browser loads nothing from elsewhere.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

import streamlit as st

from hotlap.common.errors import DataError
from hotlap.common.terminal import printable
from hotlap.serve.saved_conversations import Changed

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^`\n]*)$")
PUNCTUATION = str.maketrans({sign: f"\\{sign}" for sign in string.punctuation})
LANGUAGES = ("python", "json", "bash")  # whose words are coloured


def plain(text: str) -> None:
    """Show text as it is, with its line breaks."""
    st.text(printable(text))


def trouble(heading: str, details: str) -> None:
    """Show a message. heading: ours, as Markdown. details: of anybody."""
    with st.container(border=True):
        st.error(heading)
        plain(details)


def guarded(callback: Callable[..., None]) -> Callable[..., None]:
    """A callback whose refusals and failures are shown when the page runs after it."""

    def run(*arguments: object) -> None:
        try:
            callback(*arguments)
        except (Changed, DataError, OSError) as error:
            st.session_state.problem = str(error)

    return run


def label(text: str) -> str:
    """Text for the label of a button, on one line."""
    return " ".join(printable(text).split()).translate(PUNCTUATION)


def show(text: str) -> None:
    """Show an answer: text, and blocks of code."""
    for language, block in blocks(text):
        if language is None:
            plain(block)
        else:
            st.code(printable(block), language=language if language in LANGUAGES else None, wrap_lines=True)


def blocks(text: str) -> list[tuple[str | None, str]]:
    """The text cut at its fences. Each part comes with its language, "" if it names none; None: not code.
    A fence that is not closed goes on to the end, as it does while an answer is written.
    """
    found, lines, fence, language = [], [], "", None
    for line in [*text.split("\n"), None]:
        mark = FENCE.match(line) if line is not None else None
        opens = mark and not fence
        closes = mark and fence and mark[1].startswith(fence) and not mark[2].strip()
        if line is not None and not opens and not closes:
            lines.append(line)
            continue
        block = "\n".join(lines).strip("\n")
        if block.strip() or fence:
            found.append((language, block))
        lines = []
        fence, language = (mark[1], mark[2].strip().lower()) if opens else ("", None)
    return found

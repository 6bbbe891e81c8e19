"""The text of HTML, of info pages, and of files that people read as they are."""

from __future__ import annotations

import html
import re
from itertools import chain

UNSEEN = {"head", "script", "style", "nav", "header", "footer", "svg", "template", "noscript", "button"}
BLOCKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figure",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section",
    "table", "td", "th", "tr", "ul",
}  # fmt: skip
ENTRY = re.compile(r"^(?:\* [^\n]*::[^\n]*|File: [^\n]*,  Node: [^\n]*|\* Menu:)$", re.MULTILINE)
INFO_TABLES = re.compile(r"^(?:Tag Table|Indirect|Local Variables):.*", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)|<[!?][^<>]*>?", re.DOTALL)
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>")
COLOURS = re.compile(r"\x1b\[[\d;]{0,9}m|.\x08")  # and letters that are struck over
LINES_OF_MARKUP = re.compile(
    r"^[ \t]*(?:\.\. .*|:[\w -]+:.*|([-=~^*#\"'+.`_])\1{3,}|\[?!\[.*|<[^>\n]*>)[ \t]*$", re.MULTILINE
)


def html_text(source: str) -> str:
    """What a browser would show: blocks apart by a blank line, without scripts, menus and comments.

    html.parser takes a minute for a page of 2 MB that is made for it; this takes time by the page's length.
    """
    source = COMMENT.sub("", source)
    out, end, unseen, verbatim = [], 0, 0, 0
    for tag in chain(TAG.finditer(source), [None]):
        if not unseen:
            text = html.unescape(source[end : tag.start() if tag else None])
            out.append(text if verbatim else re.sub(r"\s+", " ", text))
        if tag:
            end, name, change = tag.end(), tag[2].lower(), -1 if tag[1] else 1
            unseen = 0 if name == "body" else max(0, unseen + change * (name in UNSEEN))
            verbatim = max(0, verbatim + change * (name == "pre"))
            out.append("\n" if name == "br" else "\n\n" if name in BLOCKS else "")
    text = "".join(out).replace("\xa0", " ").replace("\N{PILCROW SIGN}", "")
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def info_text(source: str) -> str:
    """An info page without its menus, the lines that link its nodes, and its tables."""
    nodes = (INFO_TABLES.sub("", node.lstrip("\f\n")) for node in source.split("\x1f"))
    return ENTRY.sub("", "\n".join(nodes)).replace("\f", "")


def plain_text(source: str) -> str:
    """A text without lines that only reStructuredText and Markdown need: rulers, directives, badges."""
    return LINES_OF_MARKUP.sub("", COLOURS.sub("", COMMENT.sub("", source.replace("\r\n", "\n"))))

"""The text of HTML, of info pages, and of files that people read as they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser

UNSEEN = {"head", "script", "style", "nav", "header", "footer", "svg", "template", "noscript", "button"}
BLOCKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figure",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section",
    "table", "td", "th", "tr", "ul",
}  # fmt: skip
ENTRY = re.compile(r"^(?:\* [^\n]*::?[^\n]*|File: [^\n]*,  Node: [^\n]*|\* Menu:)$", re.MULTILINE)
INFO_TABLES = re.compile(r"^(?:Tag Table|Indirect|Local Variables):.*", re.MULTILINE | re.DOTALL)
LINES_OF_MARKUP = re.compile(
    r"^[ \t]*(?:\.\. .*|:[\w -]+:.*|([-=~^*#\"'+.`_])\1{3,}|\[?!\[.*|<[^>\n]*>)[ \t]*$", re.MULTILINE
)

UNSEEN_TEXT = re.compile(
    r"\x1b\[[\d;]*m|.\x08|<!--.*?-->", re.DOTALL
)  # colours, letters struck over; comments


class Text(HTMLParser):
    """Collects what a browser would show as text."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.unseen = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.unseen += tag in UNSEEN
        self.verbatim += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n" if tag == "br" else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.unseen -= tag in UNSEEN and self.unseen > 0
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in BLOCKS and tag != "br":
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """The text of a page: blocks apart by a blank line, without scripts, menus and links to paragraphs."""
    page = Text()
    page.feed(source)
    page.close()
    text = "".join(page.parts).replace("\xa0", " ").replace("\N{PILCROW SIGN}", "")
    text = re.sub(r" *\n *(?=\n)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def info_text(source: str) -> str:
    """An info page without its menus, the lines that link its nodes, and its tables."""
    nodes = (INFO_TABLES.sub("", node.lstrip("\f\n")) for node in source.split("\x1f"))
    return ENTRY.sub("", "\n".join(nodes)).replace("\f", "")


def plain_text(source: str) -> str:
    """A text without lines that only reStructuredText and Markdown need: rulers, directives, badges."""
    return LINES_OF_MARKUP.sub("", UNSEEN_TEXT.sub("", source.replace("\r\n", "\n")))

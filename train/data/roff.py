"""The text of a manual page's source, without running anything.

Rendered pages are justified and hyphenated for a terminal; this keeps paragraphs on lines of their own.
"""

from __future__ import annotations

import re

MACRO = re.compile(r"[.'][ \t]*(\w\w?|\\\")?[ \t]*(.*)")
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)')
PUNCTUATION = re.compile(r" (?=[.,;:)\]](?: |$))")
HEADINGS = {"SH", "SS", "Sh", "Ss"}
BREAKS = {"PP", "P", "LP", "Pp", "sp", "TP", "TQ", "HP", "It", "Bd", "Ed", "El"}
LINES = {"nf", "EX", "Vb", "Bd"}, {"fi", "EE", "Ve", "Ed"}  # begin and end what is not filled
JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}  # fonts that alternate, without spaces
SPACED = {"B", "I", "R", "SM", "SB"}
IGNORED = {"de": "..", "ig": "..", "am": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}  # until this line
# Macros of the BSDs' pages, which are also words of a line; Fl puts a dash before the next word.
MDOC = re.compile(
    "A[dnqrt]|B[coqx]|Br[coq]|C[dm]|D[coqv]|E[mrv]|F[alntx]|I[cnt]|L[bik]|M[st]|N[dmosx]|O[copx]|P[acfoq]"
    "|Q[lq]|Rv|S[qtxy]|Tn|Ux|V[at]|X[cor]"
)
CHARACTERS = {
    "aq": "'", "Aq": "'", "oq": "'", "cq": "'", "dq": '"', "lq": '"', "rq": '"', "L\"": '"', "R\"": '"',
    "C`": '"', "C'": '"', "em": "--", "en": "-", "hy": "-", "bu": "*", "co": "(c)", "ha": "^", "ti": "~",
    "ga": "`", "mu": "x", "lt": "<", "gt": ">", "->": "->", "<-": "<-", ">=": ">=", "<=": "<=", "!=": "!=",
    "+-": "+-", "at": "@", "sh": "#", "Do": "$", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "ba": "|",
    "or": "|", "rs": "\\", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": " ", "-": "-", "'": "'",
    "`": "`", ".": ".",
}  # fmt: skip
UNICODE = re.compile("u[0-9A-F]{4}")
NAME = r"(?:\[[^]]{0,80}\]|\(..|.)"
ESCAPE = re.compile(
    rf"\\(?:[fFgkMmYRn][-+]?{NAME}|s[-+]?(?:\[[^]]{{0,80}}\]|\(\d\d|\d)"  # fonts, sizes
    r"|[hvwbDLlNoXxZ]'[^']{0,200}'"  # moves
    r"|\*?(?:\[([^]]{0,80})\]|\((..))|\*(.)|(.))"
)


def manual_text(source: str) -> str:
    """The text of a page's source in man or mdoc macros, paragraphs apart by a blank line."""
    out: list[str] = []  # paragraphs, and lines in them
    filled, skipped_until, depth, subject = True, "", 0, ""
    for line in source.splitlines():
        if skipped_until:
            skipped_until = "" if line.strip() == skipped_until else skipped_until
        elif depth or re.match(r"[.'][ \t]*(?:if|ie|el|while)\b", line):
            depth += line.count("\\{") - line.count("\\}")
        elif not line.startswith((".", "'")):
            out.append(("" if filled else "\n") + unescaped(line) if line.strip() else "\n\n")
        else:
            name, rest = MACRO.match(line).groups()
            if name in IGNORED:
                skipped_until = IGNORED[name]
            elif name in HEADINGS:
                out += ["\n\n", joined(rest), "\n\n"]
            elif name == "IP":
                out += ["\n\n", *([unescaped(words[0])] if (words := arguments(rest)) else []), " "]
            elif name == "br":
                out.append("\n")
            else:
                if name in BREAKS:
                    out.append("\n\n")
                if name in JOINED:
                    out.append("".join(map(unescaped, arguments(rest))))
                elif name in SPACED:
                    out.append(joined(rest))
                elif name and MDOC.fullmatch(name):
                    words = arguments(rest)
                    subject = subject or (words[0] if name == "Nm" and words else "")
                    out.append(mdoc_text([name, *(words or [subject] * (name == "Nm"))]))
                filled = name not in LINES[0] and (filled or name in LINES[1])
    text = re.sub(r" ?\n ?", "\n", re.sub(r" {2,}", " ", " ".join(out)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def arguments(rest: str) -> list[str]:
    """What stands behind a macro: words, or texts in quotes; without a comment."""
    rest = re.sub(r'\\["#].*', "", rest)
    return [quoted.replace('""', '"') or word for quoted, word in ARGUMENT.findall(rest)]


def joined(rest: str) -> str:
    return " ".join(map(unescaped, arguments(rest)))


def mdoc_text(words: list[str]) -> str:
    """The words of a line that are no macros, `ls 1` of a reference as ls(1)."""
    out, before = [], ""
    for i, word in enumerate(words):
        if MDOC.fullmatch(word):
            before = "-" if word == "Fl" else ""
        elif i > 1 and words[i - 2] == "Xr":
            out[-1] += f"({word})"
        else:
            out.append(before + unescaped(word))
            before = ""
    return PUNCTUATION.sub("", " ".join(out))


def unescaped(text: str) -> str:
    """The text with characters for their escapes, and without fonts, sizes and comments."""
    return ESCAPE.sub(character, re.sub(r'\\["#].*', "", text))


def character(escape: re.Match) -> str:
    name = next(filter(None, escape.groups()), "")
    return chr(int(name[1:], 16)) if UNICODE.fullmatch(name) else CHARACTERS.get(name, "")

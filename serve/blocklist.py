"""A list of words, phrases and regular expressions that no question and no answer may have."""

from __future__ import annotations

import re
from pathlib import Path

from hotlap.common.errors import DataError

LONGEST = 100  # characters of an entry, and of what a regular expression matches for certain in a stream
GAP = r"\s{1,4}"  # between the words of a phrase
MOST_GAP = 4  # characters of it


class Blocklist:
    """The hook of a list. `longest` is the length of its longest entry in characters."""

    def __init__(self, path: Path):
        """Read a file. A line is a word or phrase, which is found as whole words, or a /regular expression/;
        case does not count. Empty lines, and lines that begin with #, say nothing. DataError names the file
        and the line.
        """
        self.name, self.longest = path.name, 1
        self._phrases: dict[str, int] = {}  # to their lines
        self._expressions: list[tuple[re.Pattern, int]] = []
        for number, line in enumerate(lines_of(path), 1):
            if (entry := line.strip()) and not entry.startswith("#"):
                self._add(entry, number, f"{path}:{number}")
        if not self._phrases and not self._expressions:
            raise DataError(f"{path}: the list is empty; write a word, phrase or /regular expression/ a line")
        self._any_phrase = one_of(self._phrases)

    def _add(self, entry: str, number: int, place: str) -> None:
        if len(entry) > 1 and entry.startswith("/") and entry.endswith("/"):
            self._expressions.append((expression(entry[1:-1], place), number))
            self.longest = LONGEST
            return
        words = entry.casefold().split()
        length = sum(map(len, words)) + MOST_GAP * (len(words) - 1)
        if length > LONGEST:
            raise DataError(
                f"{place}: an entry of {length} characters, with {MOST_GAP} between words; shorten it to at "
                f"most {LONGEST}"
            )
        self._phrases.setdefault(" ".join(words), number)
        self.longest = max(self.longest, length)

    def __call__(self, text: str, direction: str) -> tuple[bool, str]:
        """Whether none of its entries is in a text; if one is, its file and line."""
        if self._any_phrase and (found := self._any_phrase.search(text.casefold())):
            return False, f"{self.name}:{self._phrases[' '.join(found.group().split())]}"
        wrong = next((number for pattern, number in self._expressions if pattern.search(text)), None)
        return (True, "") if wrong is None else (False, f"{self.name}:{wrong}")


def lines_of(path: Path) -> list[str]:
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None
    return [line.decode("utf-8-sig") for line in lines]


def expression(source: str, place: str) -> re.Pattern:
    try:
        pattern = re.compile(source, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"{place}: not a regular expression: {error}") from None
    if pattern.search(""):
        raise DataError(f"{place}: this regular expression matches an empty text, so it would block all")
    return pattern


def one_of(phrases: dict[str, int]) -> re.Pattern | None:
    """A pattern that finds phrases as whole words. In one pattern, long lists stay fast."""
    if not phrases:
        return None
    patterns = (GAP.join(map(re.escape, phrase.split(" "))) for phrase in phrases)
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)")

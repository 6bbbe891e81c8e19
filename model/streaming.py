"""The text of an answer while it is generated, token by token."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of an incomplete character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    @property
    def inside(self) -> bool:
        """Whether the bytes so far end inside of a character."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """The remaining text; an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class AnswerText:
    """The text of an answer up to the first of its stop strings.

    `text` grows with each token. Its end is held back while it may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._decoder, self._stop = StreamDecoder(tokenizer), stop
        self._held = ""
        self.text = ""
        self.stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> None:
        self._add(self._decoder.push(token))

    def finish(self) -> None:
        """The answer has ended: what was held back is text."""
        self._add(self._decoder.finish())
        self.text, self._held = self.text + self._held, ""

    def _add(self, piece: str) -> None:
        if self.stopped:
            return
        text = self._held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        self.stopped = bool(found)
        # of several, the one that ends first, so that it does not matter how tokens cut the text
        end = min(found)[1] if found else len(text) - self._beginning(text)
        self.text, self._held = self.text + text[:end], "" if found else text[end:]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of text that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)

"""Log-probabilities of tokens in the two forms of OpenAI's API: of chat, and of completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlap.model.conversation import AnswerParts
from hotlap.model.streaming import StreamDecoder

if TYPE_CHECKING:  # the engine imports torch
    from hotlap.model.engine import Token
    from hotlap.model.tokenizer import Tokenizer

LOWEST = -9999.0  # what OpenAI sends for a probability of 0: JSON has no infinity


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """A token as text: a special token by its name, a part of a character as `bytes:\\xe2\\x80`."""
    if token >= tokenizer.text_size:
        return next((name for name, i in tokenizer.special.items() if i == token), f"<|{token}|>")
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatLogprobs:
    """`logprobs` of a chat's answer, a few tokens at a time: of its text, without what is hidden."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.parts = tokenizer, AnswerParts(tokenizer)

    def of(self, tokens: list[Token]) -> dict:
        """`content`: for each token its text, its bytes, its log-probability, and the likeliest tokens."""
        shown = [token for token in tokens if self.parts.push(token.id) == "text"]
        return {
            "content": [
                self.entry(token.id, token.logprob)
                | {"top_logprobs": [self.entry(*alternative) for alternative in token.top]}
                for token in shown
                if token.id < self.tokenizer.text_size  # the end of the answer, or of a result, is no text
            ]
        }

    def entry(self, token: int, logprob: float) -> dict:
        special = token >= self.tokenizer.text_size
        return {
            "token": token_text(token, self.tokenizer),
            "logprob": max(logprob, LOWEST),
            "bytes": None if special else list(self.tokenizer.token_bytes(token)),
        }


class CompletionLogprobs:
    """`logprobs` of a completion, a few tokens at a time: of all, echoed ones and the last one too."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder, self.offset = tokenizer, StreamDecoder(tokenizer), 0

    def of(self, tokens: list[Token]) -> dict:
        """Four lists with an entry for each token. The first token of a prompt has no log-probability: null.

        top_logprobs: the likeliest tokens and the token itself, by text. text_offset: where the token begins
        in the choice's text, in characters; inside of a character, where that begins.
        """
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(self.decoder.push(token.id))
        return {
            "tokens": [token_text(token.id, self.tokenizer) for token in tokens],
            "token_logprobs": [None if t.logprob is None else max(t.logprob, LOWEST) for t in tokens],
            "top_logprobs": [None if t.logprob is None else self.alternatives(t) for t in tokens],
            "text_offset": offsets,
        }

    def alternatives(self, token: Token) -> dict[str, float]:
        found: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(token_text(i, self.tokenizer), max(logprob, LOWEST))
        return found

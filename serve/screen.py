"""Answers on their way out: text leaves once the filter has checked it, and log-probabilities with it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from anyio import to_thread

from hotlap.common.log import log
from hotlap.model.conversation import AnswerParts
from hotlap.model.streaming import StreamDecoder
from hotlap.serve.metrics import Metrics
from hotlap.serve.moderation import CheckedText, Moderation
from hotlap.serve.responses import Piece
from hotlap.serve.worker import Ticket

if TYPE_CHECKING:  # the engine imports torch
    from hotlap.model.engine import Token
    from hotlap.model.tokenizer import Tokenizer


class Screen:
    """Checks the pieces of a call's choices. A choice that is blocked ends there, and the others go on."""

    def __init__(self, ticket: Ticket, tokenizer: Tokenizer, moderate: Moderation | None, metrics: Metrics):
        self.ticket, self.tokenizer, self.moderate, self.metrics = ticket, tokenizer, moderate, metrics
        self.choices: dict[int, ScreenedChoice] = {}

    async def checked(self, pieces: list[Piece]) -> list[Piece]:
        """What may leave now, at most one piece for each choice; the pieces themselves without a filter."""
        if self.moderate is None:
            return pieces
        passed = await to_thread.run_sync(self._check, joined(pieces))
        for piece in passed:
            if piece.finish_reason == "content_filter":
                self.ticket.drop(piece.choice)
                self.metrics.blocked.labels("output").inc()
                log.info("the filter blocked an answer: %s", self.choices[piece.choice].text.reason)
        return passed

    def _check(self, pieces: list[Piece]) -> list[Piece]:
        found = []
        for piece in pieces:
            choice = self.choices.get(piece.choice)
            if choice is None:
                prompt = self.ticket.call.prompts[piece.choice // self.ticket.call.n]
                echoed = prompt if self.ticket.call.echo else []
                tools = bool(self.ticket.call.tools)
                choice = ScreenedChoice(self.moderate, self.tokenizer, echoed, tools)
                self.choices[piece.choice] = choice
            if not choice.text.blocked:
                found.append(choice.checked(piece))
        return found


def joined(pieces: list[Piece]) -> list[Piece]:
    """One piece for each choice, with all that is new: what came while the last was checked is one check."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        if before := found.get(piece.choice):
            text, tokens = before.text + piece.text, [*before.tokens, *piece.tokens]
            piece = piece._replace(text=text, tokens=tokens)
        found[piece.choice] = piece
    return [*found.values()]


class ScreenedChoice:
    """One answer: its text, and the tokens whose text has not left yet."""

    def __init__(self, moderate: Moderation, tokenizer: Tokenizer, echoed: list[int], tools: bool):
        """echoed: the tokens of the prompt, if the answer begins with it. tools: whether calls are hidden."""
        self.text = CheckedText(moderate)
        self._tokens: deque[tuple[int, Token]] = deque()  # and how much text must have left before each
        self._left = 0  # characters
        self._decoder, self._parts = StreamDecoder(tokenizer), AnswerParts(tokenizer)
        self._tokenizer, self._tools = tokenizer, tools
        self._decoded = 0  # characters of all tokens so far
        self._echoed, self._echo = len(echoed), len(tokenizer.decode(echoed))

    def checked(self, piece: Piece) -> Piece:
        for token in piece.tokens:
            self._tokens.append((self._end(token), token))
        if self.text.blocked:  # by a call, whose tokens do not leave either
            return Piece(piece.choice, "", [], "content_filter")
        text = self.text.push(piece.text)
        if piece.finish_reason:
            text += self.text.finish()
        reason = "content_filter" if self.text.blocked else piece.finish_reason
        return Piece(piece.choice, text, self._leaving(text), reason)

    def _leaving(self, text: str) -> list[Token]:
        """The tokens whose text has left with this text; not those of a stop string, which is unchecked."""
        self._left += len(text)
        found = []
        while self._tokens and self._tokens[0][0] <= self._left:
            found.append(self._tokens.popleft()[1])
        return found

    def _end(self, token: Token) -> int:
        """Characters of the choice's text up to the end of a token, with one that it has only a part of."""
        if self._echoed:  # the prompt's text is decoded by itself
            self._echoed -= 1
            if self._echoed == 0:
                self._decoded = self._echo
            return self._echo
        before = self._parts.part
        if self._parts.push(token.id) != "text" and self._tools:
            return self._decoded
        if before == "result" and self._tools:  # the reply lists the call as one of `executed_tools`
            for ids in (self._parts.call, self._parts.result):
                self.text.check_also(self._tokenizer.decode(ids))
        self._decoded += len(self._decoder.push(token.id))
        return self._decoded + self._decoder.inside

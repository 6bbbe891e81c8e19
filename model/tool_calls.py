"""Calls of tools in answers: from the tokens of a call to those of its result, which are forced to follow."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.request import Request
from hotlap.model.tools import run_tool

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

TOO_LONG = "error: the result is too long"


class ToolCalls:
    """Runs the calls that requests end. A request whose tool takes long has a `call` until it is done."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        special = tokenizer.special
        self.call_end = special["<|tool_end|>"]
        self.result_start, self.result_end = special["<|result_start|>"], special["<|result_end|>"]
        self.unspelt = False  # whether the tokenizer could not spell a result

    def begin(self, request: Request) -> None:
        """Run the call that a request has just ended."""
        result = run_tool(self.tokenizer.decode(request.parts.call), request.tools)
        if isinstance(result, Future):
            request.call = result
        else:
            self._force(request, result)

    def take_results(self, requests: Sequence[Request], seconds: float) -> None:
        """Let those of these requests go on whose call is done; wait for a first one up to some seconds."""
        calls = [request.call for request in requests if request.call]
        if calls and seconds:
            wait(calls, seconds, FIRST_COMPLETED)
        for request in requests:
            if request.call and request.call.done():
                result, request.call = request.call.result(), None
                self._force(request, result)

    def _force(self, request: Request, result: str) -> None:
        ids, room = self._spelt(result), request.room - len(request.tokens)
        if len(ids) + 2 >= room:  # nothing could be said after it
            ids = self._spelt(TOO_LONG)
        request.forced.extend([self.result_start, *ids, self.result_end])

    def _spelt(self, result: str) -> list[int]:
        """Ids of a result; empty if the tokenizer lacks a character of it, as the rest could be another
        number.
        """
        try:
            return self.tokenizer.encode(result)
        except DataError as error:
            if not self.unspelt:
                log.warning("warning: a tool's result stays empty, here and where this recurs: %s", error)
            self.unspelt = True
            return []

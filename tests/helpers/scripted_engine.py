"""Stands in for an engine in tests of clients: each request gets the next answer of its script."""

from __future__ import annotations

from collections import deque

from helpers.fake_engine import FakeEngine, FakeRequest

from hotlap.model.engine import Token
from hotlap.model.streaming import AnswerText


class ScriptedEngine(FakeEngine):
    """`answers`: a string each, or a list of strings and calculator calls, which are (expression, result)."""

    def __init__(self, tokenizer, slots: int = 2, pace: float = 0.0):
        super().__init__(tokenizer, slots, pace)
        self.answers: deque[str | list] = deque()
        self.running: dict[FakeRequest, tuple[deque[Token], AnswerText]] = {}

    def _tokens(self, answer: str | list) -> deque[Token]:
        special, encode, found = self.tokenizer.special, self.tokenizer.encode, deque()
        for part in [answer] if isinstance(answer, str) else answer:
            if isinstance(part, str):
                found += [Token(i, True, None) for i in encode(part)]
                continue
            call, result = part
            ids = [special["<|tool_start|>"], *encode(call), special["<|tool_end|>"]]
            ids += [special["<|result_start|>"], *encode(result), special["<|result_end|>"]]
            found += [Token(i, False, None) for i in ids]
        return found

    def _next(self, request: FakeRequest) -> Token | None:
        if request not in self.running:
            self.running[request] = self._tokens(self.answers.popleft()), AnswerText(self.tokenizer)
        left, text = self.running[request]
        token = left.popleft()
        request.tokens.append(token)
        if token.sampled:
            text.push(token.id)
            request.text = text.text
        if not left or len(request.tokens) == request.sampling.max_tokens:
            self._end(request, "length" if left else "stop")
        return token

"""Stands in for an engine in tests of the server: answers are a text again and again, a letter a step."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from string import ascii_lowercase

from hotlap.model.engine import Token
from hotlap.model.sampling import Sampling


@dataclass(eq=False)
class FakeRequest:
    prompt: list[int]
    sampling: Sampling
    logprobs: int | None
    echo: bool
    says: str
    cached: int = 0
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    echoed: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class FakeEngine:
    """Adds a letter to the answer of each request in a slot, until it has `max_tokens`.

    pace: seconds that a step takes. says: texts of the answers, in turn; by default the alphabet. `gate`:
    steps wait while it is not set. `fault`: raised by the next step.
    """

    def __init__(
        self, tokenizer, slots: int = 2, pace: float = 0.0, says: tuple[str, ...] = (ascii_lowercase,)
    ):
        self.tokenizer, self.pace, self.says = tokenizer, pace, itertools.cycle(says)
        self.slots: list[FakeRequest | None] = [None] * slots
        self.waiting: deque[FakeRequest] = deque()
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.started: list[FakeRequest] = []
        self.most_running = 0

    def add(self, prompt, sampling, tools, logprobs=None, echo=False) -> FakeRequest:
        request = FakeRequest(prompt, sampling, logprobs, echo, next(self.says))
        self.waiting.append(request)
        return request

    def cancel(self, request: FakeRequest) -> None:
        if request.finish_reason is None:
            self._end(request, "cancelled")

    def step(self) -> list[tuple[FakeRequest, Token]]:
        self.gate.wait()
        time.sleep(self.pace)
        if self.fault:
            raise self.fault
        for slot, running in enumerate(self.slots):
            if running is None and self.waiting:
                self.slots[slot] = request = self.waiting.popleft()
                self.started.append(request)
        running = [request for request in self.slots if request]
        self.most_running = max(self.most_running, len(running))
        return [(request, token) for request in running if (token := self._next(request))]

    def _next(self, request: FakeRequest) -> Token | None:
        scored = None if request.logprobs is None else -0.5
        if request.echo and not request.echoed:
            request.echoed = [Token(i, False, scored if at else None) for at, i in enumerate(request.prompt)]
        token = None
        if request.sampling.max_tokens:
            letter = request.says[len(request.tokens) % len(request.says)]
            token = Token(self.tokenizer.encode(letter)[0], True, scored)
            request.tokens.append(token)
            request.text += letter
        if len(request.tokens) == request.sampling.max_tokens:
            self._end(request, "length")
        return token

    def _end(self, request: FakeRequest, reason: str) -> None:
        request.finish_reason = reason
        if request in self.slots:
            self.slots[self.slots.index(request)] = None
        else:
            self.waiting.remove(request)

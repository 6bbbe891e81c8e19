"""A request to the engine: a prompt, and its answer so far."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from hotlap.model.config import Sampling
from hotlap.model.conversation import AnswerParts
from hotlap.model.sampling import Draw, is_greedy
from hotlap.model.streaming import AnswerText
from hotlap.model.tools import Tools

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    id: int
    sampled: bool
    """False if it was forced (a tool's result) or is of the prompt. Serves as the loss mask for reinforcement
    learning."""
    logprob: float | None
    """Log-probability in nats at temperature 1, without penalties and truncation, over the whole (padded)
    vocabulary, as in the training loss. None unless requested."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids and their log-probabilities, of the same distribution."""


@dataclass(eq=False)
class Request:
    """Made by `Engine.add`."""

    prompt: list[int]
    sampling: Sampling
    tools: Tools
    logprobs: int | None  # alternatives of each token; None: no log-probabilities
    echo: bool  # whether the prompt's tokens are scored too
    room: int  # maximum length of the answer in tokens
    random: random.Random
    parts: AnswerParts
    said: AnswerText
    slot: int | None = None  # None while it waits
    cached: int = 0
    """Tokens of the prompt whose keys and values another sequence left in the cache."""
    tokens: list[Token] = field(default_factory=list)
    """The answer so far, including the token that ends it."""
    echoed: list[Token] = field(default_factory=list)
    """With `echo`, the tokens of the prompt as far as it is read; the first has no log-probability."""
    forced: deque[int] = field(default_factory=deque)  # the rest of a tool's result
    call: Future[str] | None = None
    """Of a tool that is running; until it is done, there is no next token."""
    finish_reason: FinishReason | None = None
    """stop: the model ended its answer, or it has a stop string. length: `max_tokens` or the context was
    reached."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        prompt: list[int],
        sampling: Sampling,
        tools: Tools,
        logprobs: int | None,
        echo: bool,
        room: int,
    ) -> Request:
        numbers, said = random.Random(sampling.seed), AnswerText(tokenizer, sampling.stop)
        parts = AnswerParts(tokenizer)
        return cls(prompt, sampling, tools, logprobs, echo, room, numbers, parts, said)

    @property
    def answer(self) -> list[int]:
        """Ids of the answer, without the token that ends it."""
        ids = [token.id for token in self.tokens]
        return ids[:-1] if self.finish_reason == "stop" and not self.said.stopped else ids

    @property
    def text(self) -> str:
        """What the answer says so far, whole once it has ended: without the stop string, and if it has tools
        without calls and results.
        """
        return self.said.text

    def draw(self) -> Draw:
        """What its next token is sampled with."""
        fixed = is_greedy(self.sampling) or bool(self.forced)
        number = 0.0 if fixed else self.random.random()
        s = self.sampling
        if s.repetition_penalty == 1 and not (s.presence_penalty or s.frequency_penalty):
            return Draw(s, number)
        return Draw(s, number, self.prompt, [token.id for token in self.tokens])

    @property
    def scores(self) -> bool:
        """Whether its tokens have log-probabilities."""
        return self.logprobs is not None or self.echo

    def push(self, token: Token) -> None:
        """Append a token to the answer."""
        self.tokens.append(token)
        part = self.parts.push(token.id)
        if part == "text" or not self.tools:
            self.said.push(token.id)

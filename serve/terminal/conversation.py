"""A conversation with a chat model, and texts that a base model continues."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hotlap.model.config import Sampling
from hotlap.model.conversation import AnswerParts, parse_answer, render, render_prompt
from hotlap.model.streaming import StreamDecoder
from hotlap.model.tools import TOOLS, Tools
from hotlap.serve.moderation import Blocked, Moderation, moderated, require_allowed
from hotlap.serve.terminal.printing import note

if TYPE_CHECKING:
    from hotlap.model.engine import Engine

LONGEST_MESSAGE = 100_000  # characters


def seeds(first: int | None) -> Iterator[int]:
    """A seed for each answer: first, first + 1, ..., or random ones if `first` is None."""
    return iter(lambda: secrets.randbits(62), None) if first is None else itertools.count(first)


def check_length(text: str) -> None:
    if len(text) > LONGEST_MESSAGE:
        raise ValueError(f"{len(text):,} characters; at most {LONGEST_MESSAGE:,}")


def ids_to_continue(text: str, engine: Engine) -> list[int]:
    """The beginning of a document, as ids; of a text that leaves too little of the context, its end."""
    check_length(text)
    tokenizer, room = engine.tokenizer, engine.model.config.context * 3 // 4
    prompt = [tokenizer.bos, *tokenizer.encode(text)]
    if len(prompt) > room:
        note(f"the text takes {len(prompt)} tokens; the model continues the last {room} of them")
    return prompt[-room:]


@dataclass(frozen=True)
class Stats:
    """Figures of an answer."""

    prompt: int  # tokens
    tokens: int  # of the answer, with tool calls and their results
    first: float  # seconds until the first token
    seconds: float  # until the last token

    def __str__(self) -> str:
        text = f"{self.tokens} token{'s' * (self.tokens != 1)}, the first after {self.first:.2f} s"
        if self.tokens < 2 or self.seconds <= self.first:
            return text
        return f"{text}, then {(self.tokens - 1) / (self.seconds - self.first):.1f} tokens/s"


class Answers:
    """What conversations and continuations share: an engine, how it samples, the filter and the tools."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        seed: int | None = None,
        moderate: Moderation | None = None,
        tools: Tools = TOOLS,
    ):
        """seed: of the first answer; sampling's own is not used. moderate: the filter."""
        self.engine, self.sampling, self.moderate, self.tools = engine, sampling, moderate, tools
        self.stats: Stats | None = None  # of the last answer
        self.start_seeds(seed)

    def start_seeds(self, seed: int | None) -> None:
        """Sample the next answer with this seed, and each one after it with the next; None: random ones."""
        self.seed, self.seeds = seed, seeds(seed)

    def generate(self, prompt: list[int]) -> Iterator[int]:
        """Stream the ids of an answer, and measure it."""
        begin = time.perf_counter()
        tokens, first, last = 0, 0.0, 0.0
        try:
            sampling = replace(self.sampling, seed=next(self.seeds))
            for token in self.engine.generate(prompt, sampling, self.tools):
                last = time.perf_counter() - begin
                first = first or last
                tokens += 1
                yield token
        finally:
            self.stats = Stats(len(prompt), tokens, first, last) if tokens else None


class Chat(Answers):
    """A conversation with a chat model."""

    system = ""  # the system message

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict] = []
        self.dropped = 0  # questions that the context has no room for
        self.unanswered: str | None = None  # the last question, if it is not in `messages`

    def with_system(self) -> list[dict]:
        """The messages of the conversation, the system message first if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def answer(self, question: str) -> Iterator[str]:
        """Stream the answer as text. Question and answer (as far as it came) join the conversation, unless
        nothing came. ValueError if the question is too long; Blocked, and neither joins, if the filter does
        not allow one of them.
        """
        self.unanswered = question
        check_length(question)
        require_allowed([self.system, question], self.moderate)
        self.messages.append({"role": "user", "content": question})
        ids: list[int] = []
        try:
            prompt, dropped = self.fitting_prompt()
            if dropped:
                note(f"the context is full: dropped the first {dropped} questions and answers")
                self.dropped += dropped
            yield from moderated(self.pieces(prompt, ids), self.moderate)
        except Blocked:
            ids.clear()
            raise
        finally:
            if messages := parse_answer(ids, self.engine.tokenizer):
                self.messages += messages
                self.unanswered = None
            else:
                self.messages.pop()

    def pieces(self, prompt: list[int], ids: list[int]) -> Iterator[str]:
        """Generate an answer. Its tokens are appended to ids, its text is streamed."""
        decoder, parts = StreamDecoder(self.engine.tokenizer), AnswerParts(self.engine.tokenizer)
        for token in self.generate(prompt):
            ids.append(token)
            if parts.push(token) == "text":
                yield decoder.push(token)
        yield decoder.finish()

    def undo(self) -> str | None:
        """Drop the last question with its answer, and return the question; None if there is none."""
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            return None
        question = self.messages[questions[-1]]["content"]
        self.messages = self.messages[: questions[-1]]
        return question

    def retry(self) -> Iterator[str]:
        """Stream another answer to the last question. If nothing comes, the earlier answer stays.
        ValueError if there is no question.
        """
        before, dropped, answered = self.messages, self.dropped, self.unanswered is None
        question = self.undo()
        if question is None:
            raise ValueError("there is no question to answer again")
        try:
            yield from self.answer(question)
        finally:
            if answered and self.unanswered is not None:
                self.messages, self.dropped, self.unanswered = before, dropped, None

    def used(self) -> int:
        """Tokens of the context that the conversation takes."""
        return len(render(self.with_system(), self.engine.tokenizer, silence=True)[0]) if self.messages else 0

    def fitting_prompt(self) -> tuple[list[int], int]:
        """Drop the oldest turns until the conversation fits. Returns its ids, and how many were dropped."""
        context = self.engine.model.config.context
        room = min(self.sampling.max_tokens, context // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        for dropped, start in enumerate(turns):
            prompt = render_prompt(system + self.messages[start:], self.engine.tokenizer)
            if len(prompt) + room <= context:
                self.messages = self.messages[start:]
                return prompt, dropped
        raise ValueError(
            f"the message takes {len(prompt)} tokens, but the context of {context} must leave {room} for an "
            "answer; shorten it"
        )


class Continuation(Answers):
    """A base model, which continues text."""

    text: str | None = None  # the last one

    def answer(self, text: str) -> Iterator[str]:
        """Stream what follows the text. ValueError if it is too long, or the filter blocks one of them."""
        check_length(text)
        self.text = text
        require_allowed([text], self.moderate)
        yield from moderated(self.pieces(ids_to_continue(text, self.engine)), self.moderate)

    def pieces(self, prompt: list[int]) -> Iterator[str]:
        """Generate a continuation."""
        decoder = StreamDecoder(self.engine.tokenizer)
        for token in self.generate(prompt):
            yield decoder.push(token)
        yield decoder.finish()

    def retry(self) -> Iterator[str]:
        """Stream another continuation of the last text. ValueError if there is none."""
        if self.text is None:
            raise ValueError("there is no text to continue again")
        yield from self.answer(self.text)

    def used(self) -> int:
        """Tokens of the context that the last text and its continuation took."""
        return self.stats.prompt + self.stats.tokens if self.stats else 0

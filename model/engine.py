"""Generation: requests that share forward passes.

Each request has its own random generator and tools. Its answer does not depend on the other requests in the
batch, except that matmuls of different shapes may round differently.
"""
# B requests of a forward pass, V vocab

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.gpu import to_device
from hotlap.common.log import log
from hotlap.kernels.attention import attention
from hotlap.kernels.cpu.threads import threads_for
from hotlap.kernels.dispatch import kernel_choice
from hotlap.model.conversation import AnswerParts
from hotlap.model.decoding import Decoder, KVCache
from hotlap.model.flops import parameter_counts
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling, sample
from hotlap.model.tools import TOOLS, Tools, run_tool

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer


class Token(NamedTuple):
    id: int
    sampled: bool
    """False if it was forced (a tool's result). Serves as the loss mask for reinforcement learning."""
    logprob: float | None
    """Log-probability in nats at temperature 1, without top-k, over the whole (padded) vocabulary, as in the
    training loss. None unless requested."""


@dataclass(eq=False)
class Request:
    """A prompt and its answer so far. Made by `Engine.add`."""

    prompt: list[int]
    sampling: Sampling
    tools: Tools
    logprobs: bool
    room: int  # maximum length of the answer in tokens
    generator: torch.Generator
    parts: AnswerParts
    slot: int | None = None  # None while it waits
    tokens: list[Token] = field(default_factory=list)
    """The answer so far, including the token that ends it."""
    forced: deque[int] = field(default_factory=deque)  # the rest of a tool's result
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    """stop: the model ended its answer. length: `max_tokens` or the context was reached."""

    @property
    def answer(self) -> list[int]:
        """Ids of the answer, without the token that ends it."""
        ids = [token.id for token in self.tokens]
        return ids[:-1] if self.finish_reason == "stop" else ids


class Engine:
    """Generates for up to `slots` requests at once; others wait in a queue.

    A request reserves cache for its prompt and its longest answer. Every slot has room for the longest
    request so far; the cache grows when a longer one gets a slot, and never shrinks. Use an engine from one
    thread.

    Each step is exactly one forward pass, even without requests. With FSDP2, a forward pass is a collective:
    each rank has its own engine and requests, and all ranks must take the same number of steps. They do if
    all of them step until all are done:

        while world.total(engine.busy)[0]:
            engine.step()

    `generate` and `complete` stop when their own requests are done, so they need an unsharded model.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int = 64):
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.embedding.weight.device
        self.cache = KVCache(model.config, slots, 0, model.compute_dtype, self.device)
        self.decoder = Decoder(model, self.cache)
        self.slots: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        special = tokenizer.special
        self.stops = {special["<|assistant_end|>"], tokenizer.bos}
        self.unspelt = False  # whether the tokenizer could not spell a tool's result
        self.token_flops = 2 * parameter_counts(model)["matmul"]
        self.tool_end = special["<|tool_end|>"]
        self.result_start, self.result_end = special["<|result_start|>"], special["<|result_end|>"]

    def choose_kernels(self) -> None:
        """Choose, and log, the kernels for prompts of any length now instead of when one is read first."""
        kernel_choice(self.device.type)
        if self.device.type != "cpu":  # elsewhere, prompts have one kernel
            return
        c = self.model.config
        for tokens in sorted({*(1 << n for n in range(1, c.context.bit_length())), c.context}):
            q, k = (
                torch.empty(0, tokens, heads, c.head_dim, dtype=self.model.compute_dtype)
                for heads in (c.heads, c.kv_heads)
            )
            for window in sorted({*c.windows}):
                attention(q, k, k, window)

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.waiting) or any(self.slots)

    def add(
        self, prompt: list[int], sampling: Sampling, tools: Tools = TOOLS, logprobs: bool = False
    ) -> Request:
        """Queue a prompt. ValueError if it is empty or fills the context.

        When the model ends a tool call, `run_tool` runs it, and the tokens of its result are forced to
        follow; none if the tokenizer lacks a character of it. If `tools` is empty, nothing is run or
        forced.
        """
        context = self.model.config.context
        if not 0 < len(prompt) < context:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {context}")
        sampling.validate()
        room = min(sampling.max_tokens, context - len(prompt))
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        parts = AnswerParts(self.tokenizer)
        request = Request(prompt, sampling, tools, logprobs, room, generator, parts)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now. No effect if it has already ended."""
        if request.finish_reason is None:
            self._end(request, "cancelled")

    @torch.no_grad()  # not inference_mode: FSDP2 keeps gathered weights for training
    def step(self) -> list[tuple[Request, Token]]:
        """One forward pass: over the prompt of one waiting request if a slot is free, else over the last
        token of every running request. Returns the next token of each request in the pass.

        After an exception, including Ctrl-C, requests can only be cancelled.
        """
        while self.waiting and None in self.slots:
            request = self.waiting.popleft()
            request.slot = self.slots.index(None)
            self.slots[request.slot] = request
            self.cache.clear(request.slot, len(request.prompt) + request.room)
        running = [request for request in self.slots if request]
        batch = [request for request in running if not request.tokens][:1] or running
        if not batch:  # other ranks wait for this forward pass
            self.cache.clear(0, 1)
            self.decoder([(self.tokenizer.bos, 0, 0)])
            return []
        tokens = len(batch) if batch[0].tokens else len(batch[0].prompt)
        with threads_for(tokens * self.token_flops):
            logits = self._decode(batch) if batch[0].tokens else self._read_prompt(batch[0])
        step = list(zip(batch, self._next_tokens(batch, logits), strict=True))
        for request, token in step:
            self._append(request, token)
        return step

    def _read_prompt(self, request: Request) -> Tensor:
        """Logits (1, V) after a prompt."""
        ids = to_device([request.prompt], self.device)
        slots = torch.full((1,), request.slot, device=self.device)
        self.cache.use(slots, torch.zeros_like(slots), len(request.prompt))
        return self.model(ids, cache=self.cache, last=True)[:, 0]

    def _decode(self, requests: list[Request]) -> Tensor:
        """Logits (B, V) after the last token of each request."""
        rows = [(r.tokens[-1].id, r.slot, len(r.prompt) + len(r.tokens) - 1) for r in requests]
        padding = self.decoder.batch_size(len(rows)) - len(rows)
        if padding:  # in a free slot, where it changes nothing: a new request starts with an empty one
            rows += [(self.tokenizer.bos, self.slots.index(None), 0)] * padding
        return self.decoder(rows)[: len(requests)]

    def _next_tokens(self, requests: list[Request], logits: Tensor) -> list[Token]:
        """The next token of each request: the forced one, or sampled from its row of logits (B, V).

        The step waits for the device once, here: everything that the host needs is in one tensor.
        """
        text = logits[:, : self.tokenizer.vocab_size]  # the head may be padded beyond the vocabulary
        chosen = sample(text, [r.sampling for r in requests], [r.generator for r in requests])
        sampled = [not r.forced for r in requests]
        if not all(sampled):
            forced = to_device([r.forced.popleft() if r.forced else -1 for r in requests], self.device)
            chosen = torch.where(forced < 0, chosen, forced)
        columns = [chosen, logits.sum(-1)]  # a sum is finite if all logits are
        if any(r.logprobs for r in requests):
            columns.append(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
        found, sums, *logprobs = torch.stack([c.double() for c in columns]).tolist()  # float64 holds ids
        if not all(map(math.isfinite, sums)):
            raise FloatingPointError("the model's logits are not finite; its weights are damaged")
        return [
            Token(int(found[i]), sampled[i], logprobs[0][i] if r.logprobs else None)
            for i, r in enumerate(requests)
        ]

    def _append(self, request: Request, token: Token) -> None:
        """Append a token to an answer. If it ends a tool call, run the tool; if it ends the answer, free the
        slot.
        """
        ends_call = token.id == self.tool_end and request.parts.part == "call"
        request.tokens.append(token)
        request.parts.push(token.id)
        if ends_call and request.tools:
            result = run_tool(self.tokenizer.decode(request.parts.call), request.tools)
            request.forced.extend([self.result_start, *self._spelt(result), self.result_end])
        if token.id in self.stops:
            self._end(request, "stop")
        elif len(request.tokens) == request.room:
            self._end(request, "length")

    def _spelt(self, result: str) -> list[int]:
        """Ids of a tool's result. None if the tokenizer lacks a character of it: the rest could be another
        number.
        """
        try:
            return self.tokenizer.encode(result)
        except DataError as error:
            if not self.unspelt:
                log.warning("warning: a tool's result stays empty, here and where this recurs: %s", error)
            self.unspelt = True
            return []

    def _end(self, request: Request, reason: Literal["stop", "length", "cancelled"]) -> None:
        request.finish_reason = reason
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self.slots[request.slot] = None

    def generate(self, prompt: list[int], sampling: Sampling, tools: Tools = TOOLS) -> Iterator[int]:
        """Stream the ids of one answer, without the token that ends it. Closing it cancels the request."""
        request = self.add(prompt, sampling, tools)
        try:
            while request.finish_reason is None:
                yield from (t.id for r, t in self.step() if r is request and t.id not in self.stops)
        finally:
            self.cancel(request)

    def complete(self, prompts: list[list[int]], sampling: Sampling, tools: Tools = TOOLS) -> list[list[int]]:
        """The ids of complete answers. Prompt i samples with seed `sampling.seed` + i."""
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(prompts):
                requests.append(self.add(prompt, replace(sampling, seed=sampling.seed + i), tools))
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [request.answer for request in requests]

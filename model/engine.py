"""Generation: requests that share forward passes.

Each request has its own random numbers and tools. Its answer does not depend on the other requests in the
batch, except that matmuls of different shapes may round differently: not so in `batch_invariant()`, where a
training pass also gives the same log-probabilities to the last bit.
"""
# B requests that get a token, E prompt tokens that are scored, N tokens of a pass, V vocab

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hotlap.common.gpu import to_device
from hotlap.kernels.attention import attention
from hotlap.kernels.cpu.threads import threads_for
from hotlap.kernels.decode_linear import most_rows
from hotlap.kernels.dispatch import kernel_choice
from hotlap.model.decoding import Decoder, Row
from hotlap.model.flops import parameter_counts
from hotlap.model.kv_cache import KVCache, Span
from hotlap.model.next_tokens import next_tokens
from hotlap.model.request import FinishReason, Request, Token
from hotlap.model.sampling import Sampling
from hotlap.model.slots import Slots
from hotlap.model.tool_calls import ToolCalls
from hotlap.model.tools import TOOLS, Tools
from hotlap.model.transformer import Transformer

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

CHUNK = 256  # tokens of prompts in a pass: a decoding step beside them takes a few times as long as alone
# Larger passes are padded to a multiple of this many tokens. oneDNN builds code for each number of rows that
# it meets, and keeps it: 0.5 GB for all numbers up to 272, of the demo's model in bfloat16 (Xeon, AMX).
MULTIPLE = 16
CALL_WAIT = 0.05  # seconds that a step waits for a tool, if all requests wait for theirs


class Chunk(NamedTuple):
    """A part of a prompt that a pass reads."""

    request: Request
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.request.prompt)

    @property
    def scored(self) -> range:
        """Indices of the prompt's tokens that this part says the probability of: the next of each token."""
        last = min(self.end, len(self.request.prompt) - 1)
        return range(self.start + 1, last + 1) if self.request.echo else range(0)


class Engine:
    """Generates for up to `slots` requests at once; others wait in a queue, and start in order.

    A step adds a token to every request that has been read, and reads up to `chunk` tokens of the prompts of
    others, so nobody's answer stops while another's prompt is read. A request has room in the cache for its
    prompt and its longest answer before it starts, so nothing is ever dropped in the middle. Every slot has
    room for the longest request so far; the cache grows when a longer one gets a slot, and never shrinks.
    Prompts that begin alike share what was computed for one of them (`Slots`): call `forget` after the
    weights have changed. Use an engine from one thread.

    Each step is exactly one forward pass, even without requests. With FSDP2, a forward pass is a collective:
    each rank has its own engine and requests, and all ranks must take the same number of steps. They do if
    all of them step until all are done:

        while world.total(engine.busy)[0]:
            engine.step()

    `generate` and `complete` stop when their own requests are done, so they need an unsharded model.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, slots: int = 64, chunk: int = CHUNK):
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self.device = model.embedding.weight.device
        self.cache = KVCache(model.config, slots, 0, model.compute_dtype, self.device, chunk)
        self.decoder = Decoder(model, self.cache)
        self.slots: list[Request | None] = [None] * slots
        self.sequences = Slots(self.cache)
        self.reading: list[Request] = []  # whose prompts are not read to the end, in the order they came
        self.waiting: deque[Request] = deque()
        self.stops = {tokenizer.special["<|assistant_end|>"], tokenizer.bos}
        self.calls = ToolCalls(tokenizer)
        self.token_flops = 2 * parameter_counts(model)["matmul"]

    def choose_kernels(self) -> None:
        """Choose, and log, the kernels for prompts of any length now instead of when one is read first."""
        kernel_choice(self.device.type)
        if self.device.type != "cpu":  # elsewhere, prompts have one kernel
            return
        c = self.model.config
        if kernel_choice("cpu") == "c":
            most_rows(self.model.compute_dtype, c.width)
        longest = min(self.chunk, c.context)
        for tokens in sorted({*(1 << n for n in range(1, longest.bit_length())), longest}):
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
        self,
        prompt: list[int],
        sampling: Sampling,
        tools: Tools = TOOLS,
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Request:
        """Queue a prompt. ValueError if it is empty, or leaves the context no room for a token of answer.

        When the model ends a tool call, `run_tool` runs it, and the tokens of its result are forced to
        follow; none if the tokenizer lacks a character of it. While a tool that takes long runs, the request
        keeps its slot and gets no token, and others go on. If `tools` is empty, nothing is run, forced or
        hidden from the text. logprobs: how many alternatives of each token to list with their
        log-probabilities; 0 is the token's own log-probability alone. echo: score the prompt's tokens too.
        """
        context = self.model.config.context
        if not 0 < len(prompt) < context + (sampling.max_tokens == 0):
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {context}")
        sampling.validate()
        room = min(sampling.max_tokens, context - len(prompt))
        request = Request.of(self.tokenizer, prompt, sampling, tools, logprobs, echo, room)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now. No effect if it has already ended."""
        if request.finish_reason is None:
            self._end(request, "cancelled")

    def forget(self) -> None:
        """Share nothing with requests that have been added before. No request may be running."""
        if any(self.slots):
            raise ValueError("a request is running; end or cancel it first")
        self.sequences = Slots(self.cache)

    @torch.no_grad()  # not inference_mode: FSDP2 keeps gathered weights for training
    def step(self) -> list[tuple[Request, Token]]:
        """One forward pass. Returns the next token of each request that got one: none of those that wait for
        a tool.

        After an exception, including Ctrl-C, requests can only be cancelled.
        """
        self._admit()
        running = [request for request in self.slots if request]
        self.calls.take_results(running, CALL_WAIT if all(request.call for request in running) else 0)
        answering = [request for request in running if request.tokens and not request.call]
        chunks = self._chunks()
        tokens = len(answering) + sum(chunk.end - chunk.start for chunk in chunks)
        with threads_for(tokens * self.token_flops):
            logits = self._read(answering, chunks) if chunks else self._decode(answering)
        if not tokens:  # other ranks wait for this forward pass
            return []
        for request in answering:
            self.sequences.hold(self._row(request))
        for request, start, end in chunks:
            self.sequences.held[request.slot] += request.prompt[start:end]
        read = [chunk.request for chunk in chunks if chunk.is_last]
        self.reading = [request for request in self.reading if request not in read]
        return self._answer(answering + read, chunks, logits)

    def _admit(self) -> None:
        """Give waiting requests free slots. The first of them waits longer if what it shares with another
        prompt is still being read.
        """
        while self.waiting and self.sequences.free:
            request = self.waiting[0]
            prefix = None if request.echo else self.sequences.prefix(request.prompt)
            if prefix and not self.sequences.is_read(prefix):
                return
            self.cache.reserve(len(request.prompt) + request.room)
            self.waiting.popleft()
            request.cached = prefix.length if prefix else 0
            request.slot = self.sequences.take(request.prompt, prefix)
            self.slots[request.slot] = request
            self.reading.append(request)

    def _chunks(self) -> list[Chunk]:
        """The parts of prompts to read next."""
        chunks, room = [], self.chunk
        for request in self.reading:
            start = len(self.sequences.held[request.slot])
            end = min(start + room, len(request.prompt))
            room -= end - start
            chunks += [Chunk(request, start, end)] if end > start else []
        return chunks

    def _decode(self, requests: list[Request]) -> Tensor:
        """Logits (B, V) after the last token of each request."""
        rows = [self._row(request) for request in requests]
        padding = self.decoder.batch_size(len(rows)) - len(rows) if rows else 1
        if padding:
            rows += [self._padding()] * padding
        return self.decoder(rows)[: len(requests)]

    def _padding(self) -> Row:
        """A row that changes nothing: in a free slot, or the next one of a request that waits for a
        tool, which will write the same again.
        """
        if self.sequences.free:
            self.cache.reserve(1)
            return Row(self.tokenizer.bos, -1, self.sequences.spare(), 0)
        row = self._row(next(request for request in self.slots if request and request.call))
        self.sequences.hold(row)
        return row

    def _row(self, request: Request) -> Row:
        """The last token of an answer."""
        before = request.tokens[-2].id if len(request.tokens) > 1 else request.prompt[-1]
        length = len(request.prompt) + len(request.tokens) - 1
        return Row(request.tokens[-1].id, before, request.slot, length)

    def _read(self, answering: list[Request], chunks: list[Chunk]) -> Tensor:
        """Logits (B + E, V) of a pass that reads parts of prompts beside the last tokens of answers: after
        each answer, after each prompt that ends, and then before each prompt token that is scored.
        """
        rows = [self._row(request) for request in answering]
        ids, previous = [row.token for row in rows], [row.previous for row in rows]
        wanted, scored = list(range(len(rows))), []  # indices of tokens whose logits are needed
        for chunk in chunks:
            scored += [len(ids) + i - 1 - chunk.start for i in chunk.scored]
            ids += chunk.request.prompt[chunk.start : chunk.end]
            previous += [-1, *chunk.request.prompt][chunk.start : chunk.end]
            wanted += [len(ids) - 1] if chunk.is_last else []
        if len(ids) > MULTIPLE:
            padding = -len(ids) % MULTIPLE
            ids, previous = ids + [self.tokenizer.bos] * padding, previous + [-1] * padding
        slots = [row.slot for row in rows] + [chunk.request.slot for chunk in chunks]
        lengths = [row.length for row in rows] + [chunk.start for chunk in chunks]
        parts = (ids, previous, slots, lengths, wanted + scored)
        numbers = to_device([number for part in parts for number in part], self.device)  # one copy
        ids, previous, slots, lengths, only = numbers.split([len(part) for part in parts])
        spans = [Span(slots[: len(rows)], lengths[: len(rows)], 1)] if rows else []
        for i, chunk in enumerate(chunks, len(rows)):
            spans.append(Span(slots[i : i + 1], lengths[i : i + 1], chunk.end - chunk.start))
        self.cache.use(*spans, previous=previous[None])
        return self.model(ids[None], cache=self.cache, only=only)[0]

    def _answer(
        self, requests: list[Request], chunks: list[Chunk], logits: Tensor
    ) -> list[tuple[Request, Token]]:
        """Give each request its next token, and prompts that are scored theirs, from logits (B + E, V)."""
        echoed = [(chunk.request, i) for chunk in chunks for i in chunk.scored]
        for request in (chunk.request for chunk in chunks if chunk.request.echo and chunk.start == 0):
            request.echoed.append(Token(request.prompt[0], False, None))
        if not len(logits):  # all that was read goes on
            return []
        tokens, of_prompts = next_tokens(logits, requests, echoed, self.tokenizer.vocab_size)
        for (request, _), token in zip(echoed, of_prompts, strict=True):
            request.echoed.append(token)
        for request, token in zip(requests, tokens, strict=True):
            self._append(request, token)
        return [pair for pair in zip(requests, tokens, strict=True) if pair[0].room]

    def _append(self, request: Request, token: Token) -> None:
        """Append a token to an answer, if it has room for one. If it ends the answer, free the slot; if it
        ends a tool call, run the tool.
        """
        if not request.room:
            return self._end(request, "length")
        ends_call = token.id == self.calls.call_end and request.parts.part == "call"
        request.push(token)
        if token.id in self.stops or request.said.stopped:
            self._end(request, "stop")
        elif len(request.tokens) == request.room:
            self._end(request, "length")
        elif ends_call and request.tools:
            self.calls.begin(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        request.said.finish()
        if request.call:
            request.call.cancel()
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.slots[request.slot] = None
        self.sequences.give_back(request.slot)
        self.reading = [other for other in self.reading if other is not request]

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

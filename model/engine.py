"""Generation: a KV cache with a slot per sequence, and requests that share forward passes.

Each request has its own random generator and tools. Its answer does not depend on the other requests in the
batch, except that matmuls of different shapes may round differently.
"""
# B slots, S positions, K kv heads, C head dim, D width

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.decode_attention import decode_attention
from hotlap.model.config import GPTConfig
from hotlap.model.conversation import AnswerParts
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling, sample
from hotlap.model.tools import TOOLS, Tools, run_tool

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer

GROWTH = 128  # the cache grows in multiples of this many tokens per slot


class KVCache:
    """Keys and values of B sequences of up to S tokens, each with its own length.

    Each layer has its own tensors: with views of one tensor, a compiled step would copy them back and forth.
    """

    def __init__(self, config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device):
        shape = (slots, length, config.kv_heads, config.head_dim)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)] for _ in range(2)
        )
        self.last_embedding = torch.zeros(slots, 1, config.width, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.use(torch.arange(slots, device=device), 1)

    def clear(self, slot: int, length: int) -> None:
        """Empty a slot for a sequence of up to `length` tokens. All slots grow if they are shorter."""
        missing = length - self.k[0].shape[1]
        if missing > 0:
            missing += -length % GROWTH
            for tensors in (self.k, self.v):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, 0, 0, missing))
        self.lengths[slot] = 0
        self.last_embedding[slot] = 0

    def use(self, slots: Tensor, new_tokens: int) -> None:
        """Set the slots (B,) that the next forward pass continues, and how many tokens it adds to each."""
        self.slots = slots
        offset = torch.arange(new_tokens, device=slots.device)
        self.held = self.lengths[slots]  # (B,) tokens before the forward pass
        self.positions = self.held[:, None] + offset  # (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Store k and v (B, T, K, C), and return the attention of q (B, T, H, C) over the whole cache."""
        return decode_attention(q, k, v, self.k[layer], self.v[layer], self.slots, self.held, window)

    def previous_embedding(self, x: Tensor) -> Tensor:
        """The previous token's embedding for each of x (B, T, D); zero for the first token of a sequence."""
        previous = torch.cat((self.last_embedding[self.slots], x[:, :-1]), dim=1)
        self.last_embedding[self.slots] = x[:, -1:]
        return previous

    def advance(self) -> None:
        self.lengths[self.slots] += self.positions.shape[1]


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
        self.slots: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        special = tokenizer.special
        self.stops = {special["<|assistant_end|>"], tokenizer.bos}
        self.tool_end = special["<|tool_end|>"]
        self.result_start, self.result_end = special["<|result_start|>"], special["<|result_end|>"]

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.waiting) or any(self.slots)

    def add(
        self, prompt: list[int], sampling: Sampling, tools: Tools = TOOLS, logprobs: bool = False
    ) -> Request:
        """Queue a prompt. ValueError if it is empty or fills the context.

        When the model ends a tool call, `run_tool` runs it, and the tokens of its result are forced to
        follow. If `tools` is empty, nothing is run or forced.
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
            self._forward([[self.tokenizer.bos]], [0])
            return []
        new = [[r.tokens[-1].id] if r.tokens else r.prompt for r in batch]
        logits = self._forward(new, [r.slot for r in batch])
        step = list(zip(batch, self._next_tokens(batch, logits), strict=True))
        for request, token in step:
            self._append(request, token)
        return step

    def _forward(self, ids: list[list[int]], slots: list[int]) -> Tensor:
        """Logits (B, V) after appending tokens to slots."""
        new = torch.tensor(ids, device=self.device)
        self.cache.use(torch.tensor(slots, device=self.device), new.shape[1])
        logits = self.model(new, cache=self.cache, last=True)[:, 0]
        self.cache.advance()
        return logits

    def _next_tokens(self, requests: list[Request], logits: Tensor) -> list[Token]:
        """The next token of each request: the forced one, or sampled from its row of logits (B, V)."""
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite; its weights are damaged")
        text = logits[:, : self.tokenizer.vocab_size]  # the head may be padded beyond the vocabulary
        drawn = sample(text, [r.sampling for r in requests], [r.generator for r in requests]).tolist()
        sampled = [not r.forced for r in requests]
        ids = [r.forced.popleft() if r.forced else token for r, token in zip(requests, drawn, strict=True)]
        logprobs: list[float | None] = [None] * len(requests)
        if any(r.logprobs for r in requests):
            chosen = torch.tensor(ids, device=self.device)[:, None]
            found = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
            logprobs = [p if r.logprobs else None for r, p in zip(requests, found, strict=True)]
        return list(map(Token, ids, sampled, logprobs))

    def _append(self, request: Request, token: Token) -> None:
        """Append a token to an answer. If it ends a tool call, run the tool; if it ends the answer, free the
        slot.
        """
        ends_call = token.id == self.tool_end and request.parts.part == "call"
        request.tokens.append(token)
        request.parts.push(token.id)
        if ends_call and request.tools:
            result = run_tool(self.tokenizer.decode(request.parts.call), request.tools)
            request.forced.extend([self.result_start, *self.tokenizer.encode(result), self.result_end])
        if token.id in self.stops:
            self._end(request, "stop")
        elif len(request.tokens) == request.room:
            self._end(request, "length")

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

"""Generation: a key-value cache with a slot for each sequence, and the decoding loop with the calculator in
it.
"""
# B slots, S positions, K kv heads, C head dim, D width

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotlap.kernels.decode_attention import decode_attention
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling, sample
from hotlap.model.tools import calculate

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer


class KVCache:
    """Keys and values of B sequences of up to S tokens, each with its own length.

    Layers have tensors of their own: of a view, a compiled step would write a copy, and copy it back.
    """

    def __init__(self, config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device):
        shape = (slots, length, config.kv_heads, config.head_dim)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)] for _ in range(2)
        )
        self.last_embedding = torch.zeros(slots, 1, config.width, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.use(torch.arange(slots, device=device), 1)

    def use(self, slots: Tensor, new_tokens: int) -> None:
        """Say which slots (B,) the next forward continues, by how many tokens each."""
        self.slots = slots
        offset = torch.arange(new_tokens, device=slots.device)
        self.held = self.lengths[slots]  # (B,) before the forward
        self.positions = self.held[:, None] + offset  # (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Store k and v (B, T, K, C), and return the attention of q (B, T, H, C) to all that is stored."""
        return decode_attention(q, k, v, self.k[layer], self.v[layer], self.slots, self.held, window)

    def previous_embedding(self, x: Tensor) -> Tensor:
        """The embedding before each of x (B, T, D): zero before the first token of a sequence."""
        previous = torch.cat((self.last_embedding[self.slots], x[:, :-1]), dim=1)
        self.last_embedding[self.slots] = x[:, -1:]
        return previous

    def advance(self) -> None:
        self.lengths[self.slots] += self.positions.shape[1]


class Engine:
    """Generates with a model: many prompts at once, each in a slot of the cache."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.embedding.weight.device
        special = tokenizer.special
        self.stops = {special["<|assistant_end|>"], tokenizer.bos}
        self.tool_start, self.tool_end = special["<|tool_start|>"], special["<|tool_end|>"]
        self.result_start, self.result_end = special["<|result_start|>"], special["<|result_end|>"]

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
        """Yield, after each step, the new tokens as (prompt index, id), until every answer has ended.

        A call of the calculator is answered in place: its result's tokens come right after the call's. Ids of
        special tokens are among the yielded ones, except those that end an answer. Prompts must leave room
        for a token.
        """
        context = self.model.config.context
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise ValueError(f"a prompt of {len(prompt)} tokens does not fit a context of {context}")
        sampling.validate()
        length = min(context, max(map(len, prompts)) + sampling.max_tokens)
        cache = KVCache(self.model.config, len(prompts), length, self.model.compute_dtype, self.device)
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        forced: list[list[int]] = [[] for _ in prompts]  # results that must be fed before sampling goes on
        call: list[list[int] | None] = [None] * len(prompts)  # expression of the call being written
        left = [min(sampling.max_tokens, length - len(p)) for p in prompts]
        logits = torch.cat([self._forward([p], [i], cache) for i, p in enumerate(prompts)])
        active = list(range(len(prompts)))
        while active:
            drawn = sample(logits, sampling, generator).tolist()
            step: list[tuple[int, int]] = []
            for i, token in zip(active, drawn, strict=True):
                token = forced[i].pop(0) if forced[i] else self._tool(i, token, call, forced)
                left[i] -= 1
                if token not in self.stops:
                    step.append((i, token))
                if token in self.stops or left[i] <= 0:
                    left[i] = 0
            yield step
            active = [i for i, _ in step if left[i] > 0]
            if active:
                last = dict(step)
                logits = self._forward([[last[i]] for i in active], active, cache)

    def _forward(self, ids: list[list[int]], slots: list[int], cache: KVCache) -> Tensor:
        """Logits (B, V) after the given new tokens of some slots."""
        new = torch.tensor(ids, device=self.device)
        cache.use(torch.tensor(slots, device=self.device), new.shape[1])
        hidden = self.model.hidden(new, cache=cache)[:, -1:]
        cache.advance()
        logits = self.model.logits(hidden)[:, 0]
        return logits[:, : self.tokenizer.vocab_size]  # the table may be padded beyond the vocabulary

    def _tool(self, i: int, token: int, call: list, forced: list[list[int]]) -> int:
        """Follow a calculator call that the model itself writes; at its end, queue the result."""
        if token == self.tool_start:
            call[i] = []
        elif token == self.tool_end and call[i] is not None:
            result = calculate(self.tokenizer.decode(call[i]))
            forced[i] = [self.result_start, *self.tokenizer.encode(result), self.result_end]
            call[i] = None
        elif call[i] is not None:
            call[i].append(token)
        return token

    def complete(self, prompts: list[list[int]], sampling: Sampling, batch: int = 64) -> list[list[int]]:
        """The whole answers, as ids, a batch of prompts at a time."""
        answers: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            part = [[] for _ in prompts[start : start + batch]]
            for step in self.generate(prompts[start : start + batch], sampling):
                for i, token in step:
                    part[i].append(token)
            answers += part
        return answers

    def spoken(self, ids: list[int]) -> str:
        """The text of an answer without tool calls and their results."""
        text, inside = [], False
        for token in ids:
            if token == self.tool_start:
                inside = True
            elif token == self.result_end:
                inside = False
            elif not inside:
                text.append(token)
        return self.tokenizer.decode(text).strip()

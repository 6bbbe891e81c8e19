"""The cache of keys and values: slots of one sequence each, and what a forward pass reads and writes.

Positions of a slot are a ring in layers with a window: the token at position p lies at p modulo the ring's
length, so such a layer keeps its window and the tokens of one forward pass, however long the sequence is.
"""
# B sequences of a span, T new tokens of each, N tokens of a pass, S cache positions
# H heads, K kv heads, C head dim

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.common.memory import amount, free_memory, require_memory
from hotlap.kernels.decode_attention import decode_attention
from hotlap.model.config import Shape

GROWTH = 128  # the cache grows in multiples of this many tokens per slot, and so do rings
SHARE = 0.8  # of the free memory, that slots may take: a pass needs some too


class Span(NamedTuple):
    """B sequences that a forward pass continues by T tokens each."""

    slots: Tensor  # (B,)
    lengths: Tensor  # (B,) tokens that each holds before
    tokens: int  # T


def ring_lengths(config: Shape, length: int, chunk: int | None) -> list[int]:
    """Positions of each layer for sequences of up to `length` tokens, `chunk` of which are added at once.

    chunk: None is any number of them, so nothing is a ring.
    """
    if chunk is None:
        return [length] * config.layers
    rings = (window + chunk - 1 + -(window + chunk - 1) % GROWTH for window in config.windows)
    return [
        length if window >= config.context else min(length, ring)
        for window, ring in zip(config.windows, rings, strict=True)
    ]


def slot_bytes(config: Shape, length: int, chunk: int | None, dtype: torch.dtype) -> int:
    """Bytes of a slot."""
    positions = sum(ring_lengths(config, length, chunk))
    return 2 * positions * config.kv_heads * config.head_dim * dtype.itemsize


def fitting_slots(config: Shape, chunk: int, dtype: torch.dtype, device: torch.device, most: int) -> int:
    """How many slots for whole contexts fit the free memory, at most `most`. ValueError if none does."""
    one, free = slot_bytes(config, config.context, chunk, dtype), free_memory(device)
    if SHARE * free < one:
        raise ValueError(
            f"a slot for a context of {config.context} tokens needs {amount(one)}, and "
            f"{amount(SHARE * free)} of memory may be taken; free some, or serve a smaller model"
        )
    return min(most, int(SHARE * free / one))


def check_cache(
    config: Shape, slots: int, length: int, dtype: torch.dtype, device, chunk: int | None = None
) -> None:
    """Raise ValueError if a `KVCache` with room for `length` tokens in each slot is more than the memory."""
    hint = "ask for fewer tokens (--max-tokens) or fewer sequences at once"
    needed = slots * slot_bytes(config, length, chunk, dtype)
    require_memory(f"a cache of {slots} x {length} tokens", needed, hint, torch.device(device))


class KVCache:
    """Keys and values of sequences of up to S tokens, each in its own slot.

    chunk: the most tokens that a forward pass adds to a sequence; None is any number of them, and then no
    layer is a ring. Each layer has its own tensors: with views of one tensor, a compiled step would copy them
    back and forth.
    """

    def __init__(
        self, config: Shape, slots: int, length: int, dtype: torch.dtype, device, chunk: int | None = None
    ):
        check_cache(config, slots, length, dtype, device, chunk)
        self.config, self.slots, self.length, self.chunk = config, slots, length, chunk
        self.k, self.v = (
            [
                torch.zeros(slots, ring, config.kv_heads, config.head_dim, dtype=dtype, device=device)
                for ring in ring_lengths(config, length, chunk)
            ]
            for _ in range(2)
        )

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    def reserve(self, length: int) -> None:
        """Make room for sequences of up to `length` tokens. All slots grow if they are shorter."""
        if length <= self.length:
            return
        check_cache(self.config, self.slots, length, self.k[0].dtype, self.device, self.chunk)
        self.length = length + -length % GROWTH
        for tensors in (self.k, self.v):
            for layer, ring in enumerate(ring_lengths(self.config, self.length, self.chunk)):
                # what is shorter than a ring can be has not wrapped yet
                tensors[layer] = F.pad(tensors[layer], (0, 0, 0, 0, 0, ring - tensors[layer].shape[1]))

    def holds(self, length: int, end: int) -> bool:
        """Whether a slot with a sequence of `length` tokens has all that the token at position `end`, which
        is no later, sees of it: a ring may have gone on past that.
        """
        return all(
            length - tensor.shape[1] <= max(0, end - window + 1)
            for tensor, window in zip(self.k, self.config.windows, strict=True)
        )

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another one."""
        for tensor in (*self.k, *self.v):
            tensor[target, :length] = tensor[source, :length]

    def use(self, *spans: Span, previous: Tensor) -> None:
        """Set what the next forward pass continues. Its tokens, (1, N), are those of the spans in order, and
        then any that only pad it, which see and change nothing.

        previous: (1, N), the id before each token, -1 for the first of a sequence.
        """
        self.spans, self.previous_ids = spans, previous
        positions = [
            (span.lengths[:, None] + torch.arange(span.tokens, device=span.lengths.device)).flatten()
            for span in spans
        ]
        whole = torch.cat(positions) if len(spans) > 1 else positions[0]
        self.padding = previous.shape[1] - len(whole)
        self.positions = (F.pad(whole, (0, self.padding)) if self.padding else whole)[None]  # (1, N)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Store k and v (1, N, K, C), and return the attention of q (1, N, H, C) over the whole cache."""
        outputs, start = [], 0
        for span in self.spans:
            B, T = len(span.slots), span.tokens
            new = [x[0, start : start + B * T].unflatten(0, (B, T)) for x in (q, k, v)]
            cache = self.k[layer], self.v[layer]
            outputs.append(decode_attention(*new, *cache, span.slots, span.lengths, window).flatten(0, 1))
            start += B * T
        if self.padding:
            outputs.append(q.new_zeros(self.padding, *q.shape[2:]))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

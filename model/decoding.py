"""Decoding: the cache of keys and values, and the step that adds a token to each of several sequences.

On a GPU, Python takes longer to launch the few hundred small kernels of a step than the GPU to run them. So
a step is captured as a CUDA graph, which is one launch. A graph repeats its kernels with the same addresses
and sizes: what differs between steps are numbers in a static tensor.
"""
# B sequences of a step, S cache positions, T new tokens, H heads, K kv heads, C head dim, D width, V vocab

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.common.gpu import captured, to_device
from hotlap.common.log import log
from hotlap.common.memory import require_memory
from hotlap.kernels.decode_attention import decode_attention
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT

GROWTH = 128  # the cache grows in multiples of this many tokens per slot


def check_cache(config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device) -> None:
    """Raise ValueError if a `KVCache` with room for `length` tokens in each slot is more than the memory."""
    keys_and_values = 2 * config.layers * length * config.kv_heads * config.head_dim
    needed = slots * (keys_and_values + config.width) * dtype.itemsize
    hint = "ask for fewer tokens (--max-tokens) or fewer sequences at once"
    require_memory(f"a cache of {slots} x {length} tokens", needed, hint, torch.device(device))


class KVCache:
    """Keys and values of sequences of up to S tokens, each in its own slot.

    Each layer has its own tensors: with views of one tensor, a compiled step would copy them back and forth.
    """

    def __init__(self, config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device):
        check_cache(config, slots, length, dtype, device)
        self.config = config
        shape = (slots, length, config.kv_heads, config.head_dim)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)] for _ in range(2)
        )
        self.last_embedding = torch.zeros(slots, 1, config.width, dtype=dtype, device=device)

    def clear(self, slot: int, length: int) -> None:
        """Prepare a slot for a new sequence of up to `length` tokens. All slots grow if they are shorter."""
        missing = length - self.k[0].shape[1]
        if missing > 0:
            check_cache(self.config, len(self.last_embedding), length, self.k[0].dtype, self.k[0].device)
            missing += -length % GROWTH
            for tensors in (self.k, self.v):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, 0, 0, missing))
        self.last_embedding[slot] = 0

    def use(self, slots: Tensor, lengths: Tensor, new_tokens: int) -> None:
        """Set the slots (B,) that the next forward pass continues, the tokens that each holds (B,), and how
        many are added to each.
        """
        self.slots, self.lengths = slots, lengths
        self.positions = lengths[:, None] + torch.arange(new_tokens, device=slots.device)  # (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Store k and v (B, T, K, C), and return the attention of q (B, T, H, C) over the whole cache."""
        return decode_attention(q, k, v, self.k[layer], self.v[layer], self.slots, self.lengths, window)

    def previous_embedding(self, x: Tensor) -> Tensor:
        """The previous token's embedding for each of x (B, T, D); zero for the first token of a sequence."""
        previous = torch.cat((self.last_embedding[self.slots], x[:, :-1]), dim=1)
        self.last_embedding[self.slots] = x[:, -1:]
        return previous


@dataclass
class Step:
    """What a step of B sequences reads, and its graph, which writes the logits."""

    inputs: Tensor  # (3, B): token, slot and length of each sequence
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None  # (B, V)


class Decoder:
    """Steps that add one token to each of B sequences in a cache.

    The first step of each B runs eagerly, which compiles its kernels; on a GPU the second one is captured as
    a graph. A cache that has grown lies elsewhere, so its steps are captured anew. Weights may change between
    steps, but only in place. FSDP2 gathers weights in other memory each time: sharded models run eagerly.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        self.device = cache.last_embedding.device
        # A sharded model's weights are DTensors. Their module, which takes a second to import, has the class.
        sharded = hasattr(model.embedding.weight, "device_mesh")
        self.captures = self.device.type == "cuda" and not sharded
        self.steps: dict[int, Step] = {}
        self.keys = cache.k[0]  # that graphs read

    def batch_size(self, sequences: int) -> int:
        """B for a number of sequences. With graphs it is a power of two or the number of slots, so that there
        are few; the caller adds tokens for an unused slot.
        """
        if not self.captures:
            return sequences
        return min(1 << (sequences - 1).bit_length(), len(self.cache.last_embedding))

    def __call__(self, rows: list[tuple[int, int, int]]) -> Tensor:
        """Logits (B, V) in float32 after one token in each of B slots. The next step may overwrite them.

        rows: token, slot and length before it of each sequence. Slots differ, but for padding.
        """
        if self.cache.k[0] is not self.keys:
            self.steps, self.keys = {}, self.cache.k[0]
        step = self.steps.get(len(rows))
        first = step is None
        if first:
            inputs = torch.empty(3, len(rows), dtype=torch.int64, device=self.device)
            step = self.steps[len(rows)] = Step(inputs)
        to_device(list(zip(*rows, strict=True)), self.device, out=step.inputs)
        if self.captures and not (first or step.graph):
            self._capture(step)
        if not step.graph:
            return self._forward(step.inputs)
        step.graph.replay()
        return step.logits

    def _forward(self, inputs: Tensor) -> Tensor:
        ids, slots, lengths = inputs
        self.cache.use(slots, lengths, 1)
        return self.model(ids[:, None], cache=self.cache, last=True)[:, 0]

    def _capture(self, step: Step) -> None:
        # graphs share memory, because one runs at a time
        pool = next((other.graph.pool() for other in self.steps.values() if other.graph), None)
        try:
            step.graph, step.logits = captured(lambda: self._forward(step.inputs), pool=pool)
        except RuntimeError as error:
            self.captures, self.steps = False, {}
            log.warning("decoding without a CUDA graph: capture failed: %s", str(error).splitlines()[0])

"""Decoding: the step that adds a token to each of several sequences in a cache.

On a GPU, Python takes longer to launch the few hundred small kernels of a step than the GPU to run them. So
a step is captured as a CUDA graph, which is one launch. A graph repeats its kernels with the same addresses
and sizes: what differs between steps are numbers in a static tensor.
"""
# B sequences of a step, V vocab

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hotlap.common.gpu import captured, to_device
from hotlap.common.log import log
from hotlap.model.kv_cache import KVCache, Span
from hotlap.model.transformer import Transformer


class Row(NamedTuple):
    """What a step reads of a sequence."""

    token: int
    previous: int  # the token before it, -1 if there is none
    slot: int
    length: int  # tokens in the slot before it


@dataclass
class Step:
    """What a step of B sequences reads, and its graph, which writes the logits."""

    inputs: Tensor  # (4, B): the fields of Row
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None  # (B, V)


class Decoder:
    """Steps that add one token to each of B sequences in a cache.

    The first step of each B runs eagerly, which compiles its kernels; on a GPU the second one is captured as
    a graph. A cache that has grown lies elsewhere, so its steps are captured anew. Weights may change between
    steps, but only in place. FSDP2 gathers weights in other memory each time: sharded models run eagerly.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache, self.device = model, cache, cache.device
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
        return min(1 << (sequences - 1).bit_length(), self.cache.slots)

    def __call__(self, rows: list[Row]) -> Tensor:
        """Logits (B, V) in float32 after one token in each of B slots. The next step may overwrite them.
        Slots differ, but for padding.
        """
        if self.cache.k[0] is not self.keys:
            self.steps, self.keys = {}, self.cache.k[0]
        step = self.steps.get(len(rows))
        first = step is None
        if first:
            inputs = torch.empty(4, len(rows), dtype=torch.int64, device=self.device)
            step = self.steps[len(rows)] = Step(inputs)
        to_device(list(zip(*rows, strict=True)), self.device, out=step.inputs)
        if self.captures and not (first or step.graph):
            self._capture(step)
        if not step.graph:
            return self._forward(step.inputs)
        step.graph.replay()
        return step.logits

    def _forward(self, inputs: Tensor) -> Tensor:
        ids, previous, slots, lengths = inputs
        self.cache.use(Span(slots, lengths, 1), previous=previous[None])
        return self.model(ids[None], cache=self.cache)[0]

    def _capture(self, step: Step) -> None:
        # graphs share memory, because one runs at a time
        pool = next((other.graph.pool() for other in self.steps.values() if other.graph), None)
        try:
            step.graph, step.logits = captured(lambda: self._forward(step.inputs), pool=pool)
        except RuntimeError as error:
            self.captures, self.steps = False, {}
            log.warning("decoding without a CUDA graph: capture failed: %s", str(error).splitlines()[0])

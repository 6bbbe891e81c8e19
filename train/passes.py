"""Forward and backward passes of micro-batches, on a GPU as CUDA graphs.

A pass launches some 60 kernels a layer, one by one from Python. A fast GPU runs those of a small model sooner
than Python launches them. A CUDA graph launches all of them at once. It repeats them with the same addresses
and sizes, so batches are copied to where the first one was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hotlap.common.gpu import captured
from hotlap.common.log import log
from hotlap.model.transformer import Transformer
from hotlap.train.data.rows import Batch
from hotlap.train.losses import Loss

SPARE = 0.08  # of a GPU's memory, which must be free beside graphs: for the optimizer, and for validation
Sums = tuple[Tensor, dict[str, Tensor]]  # as a loss returns them, detached


@dataclass
class Graph:
    """A captured pass, and what it writes."""

    graph: torch.cuda.CUDAGraph
    sums: Sums
    gradients: list[Tensor | None]  # of the model's parameters

    def replay(self, model: Transformer) -> Sums:
        self.graph.replay()
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        return self.sums


class Passes:
    """Adds the gradients of micro-batches to those of a model.

    The first micro-batch of a step makes gradients, further ones add to them: two graphs. A pass runs eagerly
    the first time, which compiles its kernels, and is captured the second time. When the shape of batches or
    an attention window changes, this begins again. Graphs keep their memory, activations and gradients,
    between passes. FSDP2 gathers weights in other memory each time: sharded models run eagerly.
    """

    def __init__(self, model: Transformer, loss: Loss):
        self.model, self.loss = model, loss
        weight = model.head.weight
        self.captures = weight.device.type == "cuda" and not isinstance(weight, DTensor)
        self._begin(None)

    def __call__(self, batch: Batch, weight: float) -> Sums:
        """Add the gradient of a batch's summed loss divided by `weight`, and return the sums of the loss.

        The next call may overwrite them.
        """
        graph = self._graph(batch) if self.captures else None
        if graph is None:
            return self._run(batch, weight)
        for name, tensor in tensors(batch).items():
            tensors(self.batch)[name].copy_(tensor)
        self.weight.fill_(weight)
        return graph.replay(self.model)

    def _run(self, batch: Batch, weight: float | Tensor) -> Sums:
        value, metrics = self.loss(self.model, batch)
        (value / weight).backward()
        return value.detach(), {name: tensor.detach() for name, tensor in metrics.items()}

    def _begin(self, key: object) -> None:
        """Forget all graphs. key: what must not change between passes."""
        self.key, self.seen = key, set()
        self.graphs: dict[bool, Graph] = {}  # by whether they make gradients

    def _graph(self, batch: Batch) -> Graph | None:
        """The graph of this pass, captured if need be; None where the pass has to run eagerly."""
        key = fixed(batch), [block.attention.window for block in self.model.blocks]
        if key != self.key:
            self._begin(key)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        makes = all(gradient is None for gradient in gradients)
        if makes not in self.seen:
            self.seen.add(makes)
            return None
        if not makes and not self._made(gradients):
            return None
        if makes not in self.graphs:
            self._capture(batch, makes)
        return self.graphs.get(makes)

    def _made(self, gradients: list[Tensor | None]) -> bool:
        """Whether these gradients are those that a graph made and another can add to."""
        first = self.graphs.get(True)
        return first is not None and all(a is b for a, b in zip(gradients, first.gradients, strict=True))

    def _capture(self, batch: Batch, makes: bool) -> None:
        if not self.graphs:
            self.batch, self.weight = batch.change(torch.clone), torch.ones((), device=batch.inputs.device)
        pool = self.graphs[True].graph.pool() if self.graphs else None  # graphs run one at a time
        try:
            # the thread that reads the next batches may allocate pinned memory meanwhile
            graph, sums = captured(
                lambda: self._run(self.batch, self.weight), pool=pool, capture_error_mode="thread_local"
            )
        except RuntimeError as error:
            self._give_up(f"capture failed: {str(error).splitlines()[0]}", makes)
            return
        self.graphs[makes] = Graph(graph, sums, [p.grad for p in self.model.parameters()])
        free, total = torch.cuda.mem_get_info(batch.inputs.device)
        if free < SPARE * total:
            del graph, sums
            self._give_up(f"they would leave {free / 1e9:.1f} GB of memory", makes)

    def _give_up(self, reason: str, makes: bool) -> None:
        log.warning("training without CUDA graphs: %s", reason)
        self.captures = False
        if makes:
            self.model.zero_grad()
        self._begin(None)
        torch.cuda.empty_cache()


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def fixed(batch: Batch) -> list[Any]:
    """What batches of one graph have in common: all but the numbers in their tensors, and the weight."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    values.pop("weight")
    return [
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in values.items()
    ]

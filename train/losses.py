"""Losses of training.

A loss takes the model and a batch, and returns the sum of the loss over the batch, with more sums to log. The
loop divides all of them by the weight of the step, which is that of its batches together, on all ranks. A
batch carries its weight, because all ranks have to know it before the first backward pass: gradients are
divided in that pass, and need none of their own for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch

# The sum to minimise, and sums by name, without a gradient, each of no dimension and on the model's device.
Loss = Callable[[GPT, Any], tuple[Tensor, dict[str, Tensor]]]


def next_token_loss(model: GPT, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the cross-entropy, in nats, over the targets of the batch, whose number is the weight."""
    return model(batch.inputs, batch.targets, document_start=batch.document_start), {}

"""Training losses.

A loss function takes the model and a batch, and returns the loss summed over the batch and further sums to
log. The loop divides all of them by the weight of the step: the sum of its batches' weights over all ranks.
Each batch carries its weight, because the backward pass divides by the step's weight, so all ranks must know
it beforehand.

On one GPU, passes are captured as CUDA graphs (passes.py), which repeat the same kernels. So what a loss
function does may depend on the shapes of a batch's tensors and on its other fields, but not on numbers in the
tensors. One that reads such numbers cannot be captured, and runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hotlap.model.transformer import Transformer
from hotlap.train.data.rows import Batch

# The sum to minimise, and sums to log by name (detached). All are 0-d tensors on the model's device.
Loss = Callable[[Transformer, Any], tuple[Tensor, dict[str, Tensor]]]


def next_token_loss(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, summed over the targets. The weight is the number of targets."""
    return model(batch.inputs, batch.targets, document_start=batch.document_start), {}

"""Losses of the training loop: each returns a sum over weighted items, which the loop divides by all
weights.
"""

from __future__ import annotations

from torch import Tensor

from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch


def next_token_loss(model: GPT, batch: Batch) -> Tensor:
    """Sum of the cross-entropy, in nats, over the targets of the batch. The weight is their number."""
    return model(batch.inputs, batch.targets, document_start=batch.document_start)

"""The model of a configuration."""

from __future__ import annotations

import torch

from hotlap.model.config import GPT2Config, Shape
from hotlap.model.gpt import GPT
from hotlap.model.gpt2 import GPT2
from hotlap.model.transformer import Transformer


def build(config: Shape, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of this shape, without weights yet. ValueError for a shape that cannot be."""
    return (GPT2 if isinstance(config, GPT2Config) else GPT)(config, compute_dtype)

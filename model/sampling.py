"""Choosing the next token from logits."""
# B batch, V vocab

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 takes the most likely token."""

    temperature: float = 0.6
    top_k: int = 50
    """Only the k most likely tokens can be drawn; 0 is all."""
    max_tokens: int = 256
    """Longest answer in tokens."""
    seed: int = 0

    def validate(self) -> Sampling:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise ValueError(f"temperature={self.temperature} must be a number from 0 to 10")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or more")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        return self


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One id for each row of logits (B, V): returns (B,) int64."""
    if sampling.temperature < 1e-5:  # so little that dividing by it may overflow
        return logits.argmax(-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

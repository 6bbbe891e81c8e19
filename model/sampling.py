"""Sampling the next token from logits."""
# B batch, V vocab, K the largest top_k

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.common.gpu import to_device
from hotlap.model.config import Sampling


def sample(logits: Tensor, settings: list[Sampling], generators: list[torch.Generator]) -> Tensor:
    """Sample one id per row of logits (B, V); returns (B,) int64.

    Each row has its own settings and generator, so its draw does not depend on the other rows. The method is
    torch.multinomial's: the id with the largest p / q, where q ~ Exp(1).
    """
    greedy = [s.temperature < 1e-5 for s in settings]  # dividing by less may overflow
    if all(greedy):
        return logits.argmax(-1)
    (B, V), device = logits.shape, logits.device
    top_k = [s.top_k if s.top_k < V else 0 for s in settings]
    if any(top_k):
        top = logits.topk(max(top_k), dim=-1).values  # (B, K), descending
        k = column(top_k, device)
        threshold = top.gather(1, (k - 1).clamp(min=0).expand(B, 1))  # (B, 1)
        logits = logits.masked_fill((k > 0) & (logits < threshold), float("-inf"))
    temperature = column([max(s.temperature, 1e-5) for s in settings], device)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    noise = torch.ones_like(probabilities)
    for i, generator in enumerate(generators):
        if not greedy[i]:
            noise[i].exponential_(generator=generator)
    drawn = (probabilities / noise).argmax(-1)
    return torch.where(to_device(greedy, device), logits.argmax(-1), drawn) if any(greedy) else drawn


def column(numbers: list, device: torch.device) -> Tensor:
    """(B, 1) on the device; (1, 1) if all are equal, which copies nothing to it."""
    if len(set(numbers)) == 1:
        return torch.full((1, 1), numbers[0], device=device)
    return to_device(numbers, device)[:, None]

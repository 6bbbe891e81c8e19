"""Sampling the next token from logits."""
# B batch, V vocab, K candidates

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from hotlap.common.gpu import to_device, widest
from hotlap.model.config import Sampling

COLDEST = 1e-5  # dividing by a lower temperature may overflow


class Draw(NamedTuple):
    """What one row of logits is sampled with."""

    settings: Sampling
    number: float = 0.0
    """A random number from 0 to less than 1, which makes the choice."""
    prompt: list[int] | tuple = ()
    """Ids of the prompt and of the answer so far, where penalties need them."""
    answer: list[int] | tuple = ()


def is_greedy(settings: Sampling) -> bool:
    return settings.temperature < COLDEST


def sample(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Sample one id per row of logits (B, V); returns (B,) int64.

    The choice of a row depends on nothing but its logits and its Draw: the number picks the id at which the
    cumulative probability, in the order of ids, first exceeds it.
    """
    logits = adjusted(logits, draws)
    settings = [draw.settings for draw in draws]
    greedy = [is_greedy(s) for s in settings]
    if all(greedy):
        return logits.argmax(-1)
    device = logits.device
    scaled = logits.float() / column([max(s.temperature, COLDEST) for s in settings], device)
    if any(s.top_k or s.top_p < 1 or s.min_p for s in settings):
        scaled = scaled.masked_fill(scaled < lowest(scaled, settings), -math.inf)
    wide = widest(device)  # in float32, the sum over a vocabulary rounds rare ids away
    cumulative = scaled.softmax(-1).cumsum(-1, dtype=wide)  # (B, V)
    most = 1 - 2 * torch.finfo(wide).eps  # of a number below 1, so that the product does not round to the sum
    numbers = to_device([[min(draw.number, most)] for draw in draws], device, wide) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, numbers, right=True)[:, 0]
    return torch.where(to_device(greedy, device), logits.argmax(-1), drawn) if any(greedy) else drawn


def lowest(scaled: Tensor, settings: list[Sampling]) -> Tensor:
    """The lowest of scaled logits (B, V) that top_k, top_p and min_p leave in each row, (B, 1). Ties with it
    stay in.
    """
    V, device = scaled.shape[1], scaled.device
    top_k = [min(s.top_k, V) or V for s in settings]
    truncated = [k for k, s in zip(top_k, settings, strict=True) if k < V or s.top_p < 1]
    most = max(truncated, default=1)
    top = scaled.topk(most, dim=-1).values  # (B, K), descending
    inside = torch.arange(most, device=device) < column(top_k, device)  # (B, K), of the k likeliest
    shares = top.masked_fill(~inside, -math.inf).softmax(-1)
    before = shares.cumsum(-1, dtype=widest(device)) - shares
    inside = inside & (before < column([s.top_p for s in settings], device, widest(device)))
    inside[:, 0] = True
    threshold = top.masked_fill(~inside, math.inf).amin(-1, keepdim=True)
    all_of_it = [k == V and s.top_p == 1 for k, s in zip(top_k, settings, strict=True)]
    threshold = threshold.masked_fill(column(all_of_it, device), -math.inf)
    share = column([math.log(s.min_p) if s.min_p else -math.inf for s in settings], device)
    return torch.maximum(threshold, top[:, :1] + share)


def adjusted(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Logits (B, V) with penalties and biases."""
    places, changes = [], []  # row and id; factor if positive, factor if negative, term
    for row, (s, _, prompt, answer) in enumerate(draws):
        found: dict[int, list[float]] = {}
        if s.repetition_penalty != 1:
            r = s.repetition_penalty
            found = {token: [1 / r, r, 0.0] for token in {*prompt, *answer}}
        if s.presence_penalty or s.frequency_penalty:
            for token, count in Counter(answer).items():
                change = found.setdefault(token, [1.0, 1.0, 0.0])
                change[2] -= s.presence_penalty + count * s.frequency_penalty
        for token, bias in s.logit_bias:
            found.setdefault(token, [1.0, 1.0, 0.0])[2] += bias
        places += [(row, token) for token in found if token < logits.shape[1]]
        changes += [change for token, change in found.items() if token < logits.shape[1]]
    if not places:
        return logits
    rows, ids = to_device(places, logits.device).T
    positive, negative, term = to_device(changes, logits.device).to(logits.dtype).T
    before = logits[rows, ids]
    after = before * torch.where(before > 0, positive, negative) + term
    return logits.index_put((rows, ids), after)


def column(numbers: list, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """(B, 1) on the device; (1, 1) if all are equal, which copies nothing to it."""
    if len(set(numbers)) == 1:
        return torch.full((1, 1), numbers[0], device=device, dtype=dtype)
    return to_device(numbers, device, dtype)[:, None]

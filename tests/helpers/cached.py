"""Forward passes that continue sequences in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.model.kv_cache import KVCache, Span


def continued(cache: KVCache, ids: Tensor, slots: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """Let the next pass add ids (B, T) to slots (B,) of the given lengths (B,), after the tokens before
    (B,), -1 where there is none. Returns the ids as the model takes them.
    """
    previous = torch.cat((before[:, None], ids[:, :-1]), dim=1)
    cache.use(Span(slots, lengths, ids.shape[1]), previous=previous.reshape(1, -1))
    return ids.reshape(1, -1)


def cached_logits(
    model: torch.nn.Module, cache: KVCache, ids: Tensor, slots: list[int], starts: list[int], count: int
) -> Tensor:
    """Logits (B, count, V) of the next `count` tokens of whole sequences ids (B, T), from starts on."""
    pairs = list(zip(ids, starts, strict=True))
    new = torch.stack([row[start : start + count] for row, start in pairs])
    before = torch.tensor([int(row[start - 1]) if start else -1 for row, start in pairs])
    flat = continued(cache, new, torch.tensor(slots), torch.tensor(starts), before)
    return model(flat, cache=cache)[0].unflatten(0, new.shape)

"""What a model costs: parameters, FLOPs a token, bytes of memory, and the share of a device's peak that is
used.

Two formulas for the FLOPs of training a token, forward and backward:

* `nanochat_flops`: 6 for each weight of a matmul (embeddings are look-ups), and 12 H C min(window, T) for
  each layer's attention, as if every query saw a full window. Compare with nanochat, nanoGPT and PaLM by this
  one.
* `causal_flops`: the same with the keys that a query really sees: its own and those before it, at most a
  window. This is what the arithmetic takes.
"""

from __future__ import annotations

import re

import torch
import torch.nn as nn

from hotlap.model.config import MLP_RATIO, GPTConfig
from hotlap.model.gpt import GPT, Linear

# Dense bf16 FLOP/s on paper, by words of the name that the driver gives; the first match counts.
# Sources: NVIDIA's data sheets of each card (without sparsity, float32 accumulation), AMD's of the MI300X.
PEAK_BF16 = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Paper peak of the device in bf16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return of_card(PEAK_BF16, torch.cuda.get_device_name(device))


def of_card(peaks: tuple[tuple[str, float], ...], name: str) -> float | None:
    """The entry of a card in a table of peaks, or None: an L40 is no L4, and a laptop's card, a 4090 D, a
    3090 Ti or a share of a card (MIG) is not the card itself.
    """
    if re.search(r"\b(Laptop|D|Ti|MIG)\b", name):
        return None
    return next((peak for words, peak in peaks if re.search(rf"\b{words}\b", name)), None)


def parameter_counts(model: GPT) -> dict[str, int]:
    """Number of parameters by part; `matmul` are those of `matrices` and `head`, the weights of matmuls."""
    linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, Linear)}
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return {
        "matmul": sum(linear.values()),
        "matrices": sum(linear.values()) - head,
        "head": head,
        "embeddings": sum(embeddings.values()),
        "scalars": total - sum(linear.values()) - sum(embeddings.values()),
        "total": total,
    }


def meta_model(config: GPTConfig) -> GPT:
    """The model without memory: for counting."""
    with torch.device("meta"):
        return GPT(config)


def nanochat_flops(model: GPT, T: int | None = None) -> int:
    """Training FLOPs a token at rows of T tokens, nanochat's formula."""
    c, counts = model.config, parameter_counts(model)
    T = T or c.context
    attention = sum(12 * c.heads * c.head_dim * min(window, T) for window in c.windows)
    return 6 * counts["matmul"] + attention


def causal_flops(model: GPT, T: int | None = None) -> int:
    """Training FLOPs a token at rows of T tokens, with the keys that each query sees."""
    c, counts = model.config, parameter_counts(model)
    T = T or c.context
    attention = 0.0
    for window in c.windows:
        w = min(window, T)
        keys = w * (w + 1) / 2 + (T - w) * w  # seen by the T queries together
        attention += 12 * c.heads * c.head_dim * keys / T
    return round(6 * counts["matmul"] + attention)


def training_bytes(
    model: GPT, rows: int, T: int, shards: int = 1, activation_bytes: int = 2
) -> dict[str, int]:
    """Memory of a training step on one of `shards` ranks, at `rows` rows of T tokens, by part.

    Activations are an estimate from the shapes. copies: with several ranks what is whole on each for a while,
    embeddings and head with their gradients in float32, and two blocks in the dtype of activations; on one
    rank the blocks' weights in that dtype, if it is not theirs, which the backward pass needs again.
    """
    c, counts = model.config, parameter_counts(model)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    kv = c.kv_heads * c.head_dim
    saved = 4 * c.width + 2 * c.width + 2 * kv + 2 * MLP_RATIO * c.width + 2 * c.width
    sharded = {
        "parameters": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": 4 * blocks + 8 * (counts["total"] - blocks),
    }
    copies = activation_bytes * blocks if activation_bytes < 4 else 0
    if shards > 1:
        copies = 8 * (counts["total"] - blocks) + 4 * activation_bytes * blocks // c.layers
    return {name: size // shards for name, size in sharded.items()} | {
        "copies": copies,
        "activations": rows * T * c.layers * saved * activation_bytes,
    }


def mfu(flops_per_token: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of the peak that training's arithmetic takes; None for an unknown
    device.
    """
    return None if peak is None else flops_per_token * tokens_per_second / peak

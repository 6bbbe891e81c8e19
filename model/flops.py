"""What a model costs: parameters, training FLOPs per token, bytes of memory, and MFU.

There are two formulas for training FLOPs per token, forward and backward:

* `nanochat_flops`: 6 for each matmul weight (embeddings are look-ups), and 12 H C min(window, T) for each
  layer's attention, as if every query saw a full window. It compares with nanochat, nanoGPT and PaLM. A
  frozen weight beside an adapter counts 4, for its own gradient is not computed.
* `causal_flops`: the same, but counting only the keys that a query sees: itself and earlier ones in its
  window. This is the arithmetic that is needed.
"""

from __future__ import annotations

import re

import torch
import torch.nn as nn

from hotlap.model.build import build
from hotlap.model.config import MLP_RATIO, GPT2Config, Shape
from hotlap.model.lora import LoRA, adapter_count, add_adapters, is_adapter
from hotlap.model.transformer import Linear, Transformer

# Data-sheet peak in dense bf16 FLOP/s, by words in the driver's name of the GPU; the first match counts.
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
    """The device's data-sheet peak in bf16 FLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    return of_card(PEAK_BF16, torch.cuda.get_device_name(device))


def of_card(peaks: tuple[tuple[str, float], ...], name: str) -> float | None:
    """The entry of a GPU in a table of peaks, or None. An L40 is not an L4; laptop GPUs, the 4090 D, the
    3090 Ti and MIG slices have no entry.
    """
    if re.search(r"\b(Laptop|D|Ti|MIG)\b", name):
        return None
    return next((peak for words, peak in peaks if re.search(rf"\b{words}\b", name)), None)


def parameter_counts(model: Transformer) -> dict[str, int]:
    """Number of parameters by part, without adapters. `matmul` is `matrices` plus `head`: all weights of
    matmuls, a tied embedding among them.
    """
    matmuls = [m.weight for m in model.modules() if isinstance(m, Linear)] + [model.head.weight]
    linear = {id(weight): weight.numel() for weight in matmuls}
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = {id(weight): weight.numel() for weight in tables if id(weight) not in linear}
    head = model.head.weight.numel()
    total = sum(p.numel() for name, p in model.named_parameters() if not is_adapter(name))
    return {
        "matmul": sum(linear.values()),
        "matrices": sum(linear.values()) - head,
        "head": head,
        "embeddings": sum(embeddings.values()),
        "scalars": total - sum(linear.values()) - sum(embeddings.values()),
        "total": total,
    }


def adapters_of(model: Transformer) -> int:
    """Number of parameters of its adapters."""
    return 0 if model.lora is None else adapter_count(model.config, model.lora.rank)


def matmul_flops(model: Transformer) -> int:
    """Per token, of the products with weights."""
    frozen = 0 if model.lora is None else 2
    return (6 - frozen) * parameter_counts(model)["matmul"] + 6 * adapters_of(model)


def meta_model(config: Shape, lora: LoRA | None = None) -> Transformer:
    """The model on the meta device, to count with."""
    with torch.device("meta"):
        model = build(config)
    if lora:
        add_adapters(model, lora)
    return model


def nanochat_flops(model: Transformer, T: int | None = None) -> int:
    """Training FLOPs per token for rows of T tokens, by nanochat's formula."""
    c = model.config
    T = T or c.context
    attention = sum(12 * c.heads * c.head_dim * min(window, T) for window in c.windows)
    return matmul_flops(model) + attention


def causal_flops(model: Transformer, T: int | None = None) -> int:
    """Training FLOPs per token for rows of T tokens, counting only the keys that each query sees."""
    c = model.config
    T = T or c.context
    attention = 0.0
    for window in c.windows:
        w = min(window, T)
        keys = w * (w + 1) / 2 + (T - w) * w  # seen by all T queries
        attention += 12 * c.heads * c.head_dim * keys / T
    return round(matmul_flops(model) + attention)


def training_bytes(
    model: Transformer, rows: int, T: int, shards: int = 1, activation_bytes: int = 2
) -> dict[str, int]:
    """Bytes of memory by part, for a training step on one of `shards` ranks with `rows` rows of T tokens.

    Activations are estimated from the shapes. copies: on several ranks, what is gathered at a time:
    embeddings and head with their gradients in float32, and two blocks in the activations' dtype; on one
    rank, the blocks' weights cast to that dtype, kept for the backward pass.
    """
    c, counts = model.config, parameter_counts(model)
    adapters = adapters_of(model)
    blocks = sum(p.numel() for p in model.blocks.parameters()) - adapters
    kv = c.kv_heads * c.head_dim
    # a block's input, queries, what attention returns, both norms and the sum before the second; keys and
    # values; the MLP's hidden layer before and after ReLU^2
    saved = 6 * c.width + 2 * kv + 2 * MLP_RATIO * c.width
    sharded = {
        "parameters": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": (8 if isinstance(c, GPT2Config) else 4) * blocks + 8 * (counts["total"] - blocks),
    }
    if adapters:  # the rest is frozen
        sharded = {
            "parameters": 4 * (counts["total"] + adapters),
            "gradients": 4 * adapters,
            "optimizer": 8 * adapters,
        }
    copies = activation_bytes * blocks if activation_bytes < 4 else 0
    if shards > 1:
        outside = (4 if adapters else 8) * (counts["total"] - blocks)
        copies = outside + 4 * activation_bytes * blocks // c.layers
    return {name: size // shards for name, size in sharded.items()} | {
        "copies": copies,
        "activations": rows * T * c.layers * saved * activation_bytes,
    }


def mfu(flops_per_token: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of the peak that training reaches; None if the peak is unknown."""
    return None if peak is None else flops_per_token * tokens_per_second / peak

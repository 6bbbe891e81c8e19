"""LoRA (Hu et al., 2021): adapters of low rank beside frozen linear layers, y = W x + scale B A x.

All linear layers of the blocks get one, but for the value gates. Queries, keys and values come from one layer
and have an A and a B each, as in models with three layers: `A` stacks their A's, `B` their B's. A starts
uniform in +-1 / sqrt(inputs), as in PEFT, and B at zero, so that training starts at the base model.
"""
# r rank, P parts of a layer: 3 for queries, keys and values, else 1

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from hotlap.kernels.batch_invariant import product
from hotlap.model.config import MLP_RATIO, Shape

if TYPE_CHECKING:
    from hotlap.model.transformer import Transformer


@dataclass(frozen=True)
class LoRA:
    """What a model's adapters are, and what they were trained beside."""

    rank: int
    alpha: float
    bases: tuple[Path, ...]
    """Where the base model may be; the first one that is there counts."""
    base_sha256: str | None
    """Of the base's weights (`weights_sha256`); None if unknown."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nn.Module):
    """scale B A x for a linear layer's input x, in its dtype. A: (P r, inputs), B: (outputs, r), float32."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], lora: LoRA, device: torch.device):
        super().__init__()
        self.outputs, self.scale = outputs, lora.scale
        self.A = nn.Parameter(torch.empty(len(outputs) * lora.rank, inputs, device=device))
        self.B = nn.Parameter(torch.empty(sum(outputs), lora.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        hidden = product(x, self.A.to(x.dtype)) * self.scale  # (..., P r)
        parts = zip(hidden.chunk(len(self.outputs), -1), self.B.to(x.dtype).split(self.outputs), strict=True)
        parts = [product(part, B) for part, B in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def adapted_layers(config: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs, and outputs of each part, of the layers of a block that get adapters, by name."""
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention.qkv": (c.width, (q, kv, kv)),
        "attention.proj": (q, (c.width,)),
        "mlp.fc": (c.width, (MLP_RATIO * c.width,)),
        "mlp.proj": (MLP_RATIO * c.width, (c.width,)),
    }


def add_adapters(model: Transformer, lora: LoRA) -> None:
    """Freeze a model that is whole, and add adapters, which `init_weights` fills."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, (inputs, outputs) in adapted_layers(model.config).items():
            layer = block.get_submodule(name)
            layer.adapter = Adapter(inputs, outputs, lora, layer.weight.device)
    model.lora = lora


def adapter_shapes(config: Shape, rank: int) -> dict[str, tuple[int, int]]:
    """The shapes of a block's adapters, by their names in the block."""
    shapes = {}
    for name, (inputs, outputs) in adapted_layers(config).items():
        shapes[f"{name}.adapter.A"] = (len(outputs) * rank, inputs)
        shapes[f"{name}.adapter.B"] = (sum(outputs), rank)
    return shapes


def adapter_count(config: Shape, rank: int) -> int:
    """Parameters of a model's adapters."""
    return config.layers * sum(rows * columns for rows, columns in adapter_shapes(config, rank).values())


def check_rank(config: Shape, rank: int) -> None:
    """ValueError if adapters of this rank would not be smaller than what they adapt."""
    most = min(min(inputs, *outputs) for inputs, outputs in adapted_layers(config).values())
    if rank > most:
        raise ValueError(
            f"lora_rank={rank} must be at most {most}, the smaller side of the smallest matrix of the base"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".adapter." in name


def base_weights(model: Transformer) -> dict[str, Tensor]:
    """The model's weights but for its adapters, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}


def trained_weights(model: Transformer) -> dict[str, Tensor]:
    """What training changes, by name: the adapters of a model that has some, else all weights."""
    weights = model.state_dict()
    return weights if model.lora is None else {n: t for n, t in weights.items() if is_adapter(n)}


def update(A: Tensor, B: Tensor, parts: tuple[int, ...], scale: float) -> Tensor:
    """scale B A, (outputs, inputs): what merging adds to a layer's weight. parts: outputs of each part."""
    products = [b @ a for a, b in zip(A.chunk(len(parts)), B.split(parts), strict=True)]
    return scale * torch.cat(products)

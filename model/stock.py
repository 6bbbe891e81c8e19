"""Our weights as those of stock classes of Transformers, and back: Apertus, and NanoChat.

Both are decoders with QK-norm, no biases and an untied head. Apertus is what models without extras are: its
activation xIELU can be ReLU², and its QK-norm holds our gain. NanoChat has a softcap and no gain.

Rotary positions of Apertus turn the other way, which exchanging the halves of each head of queries and keys
makes up for: norms and dot products do not see the order. And it adds embeddings as they are, where we
normalise them first, so the rows are divided by their RMS.
"""
# C head dim, D width, V vocab

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hotlap.kernels.rms_norm import EPS
from hotlap.model.config import GPT2Config, GPTConfig, Shape
from hotlap.model.gpt2_files import to_gpt2
from hotlap.model.lora import adapted_layers

LAYERS = "model.layers"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.proj": ("self_attn.o_proj",),
}
TARGETS = {  # what the layers of a block are called, by class
    "apertus": ATTENTION | {"mlp.fc": ("mlp.up_proj",), "mlp.proj": ("mlp.down_proj",)},
    "nanochat": ATTENTION | {"mlp.fc": ("mlp.fc1",), "mlp.proj": ("mlp.fc2",)},
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
NORMS = ("attention_layernorm.weight", "feedforward_layernorm.weight")
# xIELU is softplus(alpha_p) x² + beta x above 0, and a multiple of softplus(alpha_n) + beta below.
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -200.0, "beta": 0.0, "eps": -1e-6}
LEARNT = ("alpha_p", "alpha_n")  # tensors (1,); the others have no dimension


def extras_of(config: GPTConfig) -> list[str]:
    """The fields of a model that add what neither class has."""
    switches = ("bigram_rows", "value_embeddings", "residual_scalars", "smear", "backout")
    found = [name for name in switches if getattr(config, name)]
    return found + (["window_pattern"] if set(config.windows) != {config.context} else [])


def stock_class(config: Shape) -> str | None:
    """The class that computes the same as a model of ours: "apertus", "nanochat", "gpt2", or None."""
    if isinstance(config, GPT2Config):
        return "gpt2"
    if extras_of(config):
        return None
    if not config.softcap:
        return "apertus"
    return "nanochat" if config.qk_gain == 1 else None


def not_stock(config: Shape) -> list[str]:
    """Why no stock class computes the same as a model of ours: the fields, and their values."""
    if stock_class(config):
        return []
    names = extras_of(config) + (["softcap", "qk_gain"] if config.softcap and config.qk_gain != 1 else [])
    return [f"{name}={getattr(config, name)!r}" for name in names]


def to_stock(weights: dict[str, Tensor], config: Shape, kind: str) -> dict[str, Tensor]:
    """A whole model's weights as those of a class, float32, by its names. Nothing shares memory with them."""
    return dict(stock_tensors(weights, config, kind))


def stock_tensors(weights: dict[str, Tensor], config: Shape, kind: str) -> Iterator[tuple[str, Tensor]]:
    """`to_stock`, one tensor after the other."""
    if kind == "gpt2":
        yield from to_gpt2(weights).items()
        return
    embedding = weights["embedding.weight"]
    yield EMBEDDING, normalised(embedding) if kind == "apertus" else embedding.clone()
    yield HEAD, weights["head.weight"].clone()
    if kind == "apertus":
        yield from apertus_constants(config).items()
    for i in range(config.layers):
        for name, (_, outputs) in adapted_layers(config).items():
            parts = weights[f"blocks.{i}.{name}.weight"].split(outputs)
            for target, part in zip(TARGETS[kind][name], parts, strict=True):
                yield f"{LAYERS}.{i}.{target}.weight", placed(part, target, config, kind)


def from_stock(theirs: dict[str, Tensor], config: GPTConfig, kind: str) -> dict[str, Tensor]:
    """The inverse of `to_stock`, but for the embedding's rows, whose RMS Apertus has lost: they stay as they
    are. Constants are not read; `apertus_constants` has those that our models can have.
    """
    found = {"embedding.weight": theirs[EMBEDDING], "head.weight": theirs[HEAD]}
    for i in range(config.layers):
        for name in adapted_layers(config):
            parts = [
                placed(theirs[f"{LAYERS}.{i}.{target}.weight"], target, config, kind)
                for target in TARGETS[kind][name]
            ]
            found[f"blocks.{i}.{name}.weight"] = torch.cat(parts)
    return found


def placed(part: Tensor, target: str, config: GPTConfig, kind: str) -> Tensor:
    """A copy of a layer's weight with its rows in the other one's order. Its own inverse."""
    return turned(part, target, config) if kind == "apertus" else part.clone()


def turned(rows: Tensor, target: str, config: GPTConfig) -> Tensor:
    """A copy of a weight (outputs, n) with the halves of each head exchanged, where heads are rotated. Its
    own inverse.
    """
    if target not in ROTATED:
        return rows.clone()
    return rows.view(-1, 2, config.head_dim // 2, rows.shape[1]).flip(1).reshape(rows.shape)


def normalised(embedding: Tensor) -> Tensor:
    """An embedding (V, D) as our forward pass reads it, every row divided by its RMS, in float32."""
    rows = embedding.double()
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)).float()


def apertus_constants(config: GPTConfig) -> dict[str, Tensor]:
    """What Apertus has and we have not, with the values at which it computes what we do."""
    found = {"model.norm.weight": torch.ones(config.width)}
    for i in range(config.layers):
        layer = f"{LAYERS}.{i}"
        found |= {f"{layer}.{name}": torch.ones(config.width) for name in NORMS}
        found |= {f"{layer}.{name}": torch.full((config.head_dim,), config.qk_gain) for name in QK_NORMS}
        for name, value in XIELU.items():
            value = torch.tensor([value] if name in LEARNT else value)
            found[f"{layer}.mlp.act_fn.{name}"] = value
    return found

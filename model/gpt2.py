"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases, GELU, and a head tied to the embedding.

It has no dropout, like nanoGPT's when it pretrains. Attention, loss and embeddings are our kernels; LayerNorm
and GELU are torch's, which torch.compile fuses.
"""
# B batch, T time, D width, H heads, C head dim

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.attention import attention
from hotlap.kernels.embedding import token_runs
from hotlap.model.config import MLP_RATIO, GPT2Config
from hotlap.model.lora import is_adapter
from hotlap.model.transformer import Cache, Embedding, Linear, Transformer

DEVIATION = 0.02  # of the first weights


class LayerNorm(nn.LayerNorm):
    """With float32 weights, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        self.qkv = Linear(config.width, 3 * config.width, bias=True)
        self.proj = Linear(config.width, config.width, bias=True)

    def forward(self, x: Tensor, document_start: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.config.heads, self.config.head_dim)
        q, k, v = qkv.unbind(2)  # (B, T, H, C)
        if cache is None:
            y = attention(q, k, v, self.window, document_start)
        else:
            y = cache.attend(self.layer, q, k, v, self.window)
        return self.proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.fc = Linear(config.width, MLP_RATIO * config.width, bias=True)
        self.proj = Linear(MLP_RATIO * config.width, config.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, document_start: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), document_start, cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT2(Transformer):
    """A GPT-2 of the given shape."""

    def __init__(self, config: GPT2Config, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.positions = Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = LayerNorm(config.width)

    @property
    def head(self) -> Embedding:
        """The embedding: what reads a token also predicts it."""
        return self.embedding

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        device = self.embedding.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        residual = DEVIATION * (2 * self.config.layers) ** -0.5  # of what is added to the residual stream
        for name, parameter in self.named_parameters():
            if is_adapter(name):
                continue
            shape = parameter.shape
            if parameter.ndim == 2:
                deviation = residual if name.endswith("proj.weight") else DEVIATION
                yield name, torch.empty(shape, device=device).normal_(0, deviation, generator=generator)
            else:
                yield name, torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
        yield from self.initial_adapters(generator)

    def hidden(self, ids: Tensor, document_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if not self.config.document_masks:
            document_start = None
        if cache is None:
            self.check_context(ids)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            if document_start is not None:
                positions = positions - document_start
        else:
            positions = cache.positions
        tokens = self.embedding(ids, self.compute_dtype, token_runs(ids, self.embedding.weight))
        x = tokens + self.positions(positions, self.compute_dtype, None)
        for block in self.blocks:
            x = block(x, document_start, cache)
        return self.norm(x)

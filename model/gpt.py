"""GPT: a decoder-only transformer with rotary positions, QK-norm, parameter-free RMSNorm and ReLU^2.

The extras of the speedruns (bigrams, value embeddings, residual and x0 scalars, smear, backout, logit
softcap) are each a few lines behind a field of `GPTConfig`.
"""
# B batch, T time, D width, H heads, K kv heads, C head dim, V vocab

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.attention import attention
from hotlap.kernels.batch_invariant import sigmoid
from hotlap.kernels.decode_linear import fusing_pays, linear_residual, norm_linear
from hotlap.kernels.embedding import token_runs
from hotlap.kernels.fp8 import linear_relu2_fp8
from hotlap.kernels.linear_relu2 import linear_relu2
from hotlap.kernels.qkv import attention_inputs, rotary_tables
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import rms_norm, rms_norm_residual
from hotlap.model.config import GATE_CHANNELS, MLP_RATIO, ROPE_BASE, SMEAR_CHANNELS, GPTConfig
from hotlap.model.transformer import Cache, Embedding, Linear, Transformer


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        heads = config.heads + 2 * config.kv_heads
        self.qkv = Linear(config.width, heads * config.head_dim)
        self.proj = Linear(config.heads * config.head_dim, config.width)
        self.value_gate = None
        if layer in config.value_embedding_layers:
            self.value_gate = Linear(min(GATE_CHANNELS, config.width), config.kv_heads)

    def forward(
        self,
        x: Tensor,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        document_start: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        qkv = self.qkv(x)
        gate = None if self.value_gate is None else self.value_gate(x[..., :GATE_CHANNELS])
        return self.proj(self.attend(qkv, gate, value_embedding, cos, sin, document_start, cache))

    def attend(
        self,
        qkv: Tensor,
        gate: Tensor | None,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        document_start: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """What the heads make (B, T, H C) of the projection (B, T, (H + 2K) C) and the gates (B, T, K)."""
        c = self.config
        B, T, _ = qkv.shape
        if gate is not None:
            value_embedding = value_embedding.view(B, T, c.kv_heads, c.head_dim)
        qkv = qkv.view(B, T, -1, c.head_dim)
        q, k, v = attention_inputs(qkv, c.kv_heads, cos, sin, c.qk_gain, gate, value_embedding)
        if cache is None:
            y = attention(q, k, v, self.window, document_start)
        else:
            y = cache.attend(self.layer, q, k, v, self.window)
        return y.reshape(B, T, -1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = Linear(config.width, MLP_RATIO * config.width)
        self.proj = Linear(MLP_RATIO * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc.scales is not None or self.fc.adapter is not None:
            return self.proj(relu2(self.fc(x)))
        fp8 = self.fc.fp8 and torch.is_grad_enabled()
        return (linear_relu2_fp8 if fp8 else linear_relu2)(x, self.fc.weight, self.proj.weight)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mix: tuple[Tensor, Tensor, Tensor] | None,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        document_start: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """mix: scales of x and x0, and x0; the block reads the scaled sum. None: it reads x."""
        qkv = self.attention.qkv
        if cache is not None and qkv.adapter is None and fusing_pays(x, qkv.weight):
            return self.decode(x, mix, value_embedding, cos, sin, cache)
        if mix is None:
            normalised = rms_norm(x)
        else:
            scale, x0_scale, x0 = mix
            normalised, x = rms_norm_residual(x, x0, scales=(scale, x0_scale))  # scale * x + x0_scale * x0
        attended = self.attention(normalised, value_embedding, cos, sin, document_start, cache)
        normalised, x = rms_norm_residual(attended, x)  # x + attended
        return x + self.mlp(normalised)

    def decode(
        self,
        x: Tensor,
        mix: tuple[Tensor, Tensor, Tensor] | None,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
    ) -> Tensor:
        """`forward` for a few tokens, whose products take the norms, mix and residuals around them along."""
        attention, mlp = self.attention, self.mlp
        gate = None if attention.value_gate is None else attention.value_gate.weight
        qkv, x, gates = norm_linear(x, attention.qkv.weight, mix, gate, scales=attention.qkv.scales)
        attended = attention.attend(qkv, gates, value_embedding, cos, sin, None, cache)
        x = linear_residual(attended, attention.proj.weight, x, attention.proj.scales)
        hidden, _, _ = norm_linear(x, mlp.fc.weight, squared_relu=True, scales=mlp.fc.scales)
        return linear_residual(hidden, mlp.proj.weight, x, mlp.proj.scales)


class GPT(Transformer):
    """A GPT of the given shape."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head = Linear(config.width, config.vocab_size)
        kv_width = config.kv_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(i): Embedding(config.vocab_size, kv_width) for i in config.value_embedding_layers}
        )
        if config.bigram_rows:
            self.bigrams = Embedding(config.bigram_rows, config.width)
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.empty(config.layers))
            self.x0_scale = nn.Parameter(torch.empty(config.layers))
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_CHANNELS, config.width), 1)
            self.smear_scale = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_scale = nn.Parameter(torch.empty(1))
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(config.context, config.head_dim // 2), persistent=False)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        c = self.config
        device = self.embedding.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        bound = 3**0.5 * c.width**-0.5  # uniform with standard deviation 1 / sqrt(width)

        def normal(parameter: Tensor, deviation: float) -> Tensor:
            return torch.empty(parameter.shape, device=device).normal_(0, deviation, generator=generator)

        def uniform(parameter: Tensor, low: float, high: float) -> Tensor:
            return torch.empty(parameter.shape, device=device).uniform_(low, high, generator=generator)

        yield "embedding.weight", normal(self.embedding.weight, 0.8)
        yield "head.weight", normal(self.head.weight, 0.001)
        for i, block in enumerate(self.blocks):
            attention, mlp = block.attention, block.mlp
            yield f"blocks.{i}.attention.qkv.weight", uniform(attention.qkv.weight, -bound, bound)
            # projections start at zero, so that each block starts as the identity
            yield f"blocks.{i}.attention.proj.weight", torch.zeros(attention.proj.weight.shape)
            yield f"blocks.{i}.mlp.fc.weight", uniform(mlp.fc.weight, -0.4 * bound, 0.4 * bound)
            yield f"blocks.{i}.mlp.proj.weight", torch.zeros(mlp.proj.weight.shape)
            if attention.value_gate is not None:
                yield f"blocks.{i}.attention.value_gate.weight", uniform(attention.value_gate.weight, 0, 0.02)
        for layer, table in self.value_embeddings.items():
            yield f"value_embeddings.{layer}.weight", uniform(table.weight, -bound, bound)
        if c.bigram_rows:
            yield "bigrams.weight", torch.zeros(self.bigrams.weight.shape)
        if c.residual_scalars:
            yield "residual_scale", torch.linspace(1.15, 1.05, c.layers)
            yield "x0_scale", torch.linspace(0.20, 0.05, c.layers)
        if c.smear:
            yield "smear_gate.weight", uniform(self.smear_gate.weight, 0, 0.02)
            yield "smear_scale", torch.zeros(1)
        if c.backout:
            yield "backout_scale", torch.tensor([0.2])
        yield from self.initial_adapters(generator)
        yield from zip(("cos", "sin"), rotary_tables(c.context, c.head_dim, ROPE_BASE, device), strict=True)

    def hidden(self, ids: Tensor, document_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        c = self.config
        if not c.document_masks:
            document_start = None
        if cache is None:
            self.check_context(ids)
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        else:
            cos, sin = self.cos[cache.positions], self.sin[cache.positions]  # (B, T, C/2)
        runs = token_runs(ids, self.embedding.weight)  # sorted once for all tables
        x = rms_norm(self.embedding(ids, self.compute_dtype, runs))  # (B, T, D)
        if c.smear:
            x = self.smeared(x, document_start, cache)
        if c.bigram_rows:
            previous = previous_ids(ids, document_start) if cache is None else cache.previous_ids
            pairs = bigram_hash(ids, previous, c.bigram_rows)
            bigrams = self.bigrams(pairs, x.dtype, token_runs(pairs, self.bigrams.weight))
            x, _ = rms_norm_residual(bigrams, x)  # norm of x + bigrams
        x0, middle = x, None
        for i, block in enumerate(self.blocks):
            mix = None
            if c.residual_scalars:
                mix = self.residual_scale[i].to(x.dtype), self.x0_scale[i].to(x.dtype), x0
            value_embedding = None
            if i in c.value_embedding_layers:
                value_embedding = self.value_embeddings[str(i)](ids, x.dtype, runs)
            x = block(x, mix, value_embedding, cos, sin, document_start, cache)
            if c.backout and i == c.layers // 2:
                middle = x
        if not c.backout:
            return rms_norm(x)
        scale = self.backout_scale.to(x.dtype)[0]
        return rms_norm_residual(x, middle, scales=(torch.ones_like(scale), -scale))[0]  # x - scale * middle

    def smeared(self, x: Tensor, document_start: Tensor | None, cache: Cache | None) -> Tensor:
        """x with a gated share of the previous token added to each token, except the first of a document."""
        if cache is None:
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            ids = cache.previous_ids
            previous = rms_norm(self.embedding(ids.clamp(min=0), x.dtype, None)) * (ids >= 0).unsqueeze(-1)
        if document_start is not None:
            t = torch.arange(x.shape[1], device=x.device)
            previous = previous * (t > document_start).unsqueeze(-1)
        gate = self.smear_scale.to(x.dtype) * sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * previous


def previous_ids(ids: Tensor, document_start: Tensor | None) -> Tensor:
    """The id before each of ids (B, T); -1 for the first of a document."""
    previous = F.pad(ids[:, :-1], (1, 0), value=-1)
    if document_start is None:
        return previous
    t = torch.arange(ids.shape[1], device=ids.device)
    return previous.masked_fill(t <= document_start, -1)


def bigram_hash(ids: Tensor, previous: Tensor, rows: int) -> Tensor:
    """The row, from 0 to rows - 1, of each id and the one before. All (B, T)."""
    return (ids.long() * 0x9E3779B1 + previous.long() * 0x85EBCA77) % rows

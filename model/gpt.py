"""GPT: a decoder-only transformer with rotary positions, QK-norm, parameter-free RMSNorm and ReLU^2.

The extras of the speedruns (value embeddings, residual and x0 scalars, smear, backout, logit softcap) are
each a few lines behind a field of `GPTConfig`. The model knows nothing about distribution. It can be built on
any device, `meta` included; `init_weights` fills it.
"""
# B batch, T time, D width, H heads, K kv heads, C head dim, V vocab

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.attention import attention
from hotlap.kernels.batch_invariant import product, sigmoid
from hotlap.kernels.cross_entropy import softcap_logits
from hotlap.kernels.decode_linear import fusing_pays, linear, linear_residual, norm_linear
from hotlap.kernels.embedding import embedding, token_runs
from hotlap.kernels.fp8 import fp8_pays, linear_fp8, linear_relu2_fp8
from hotlap.kernels.int8 import dequantized, quantize_rows
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.linear_relu2 import linear_relu2
from hotlap.kernels.qkv import attention_inputs, rotary_tables
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import rms_norm, rms_norm_residual
from hotlap.model.config import GATE_CHANNELS, MLP_RATIO, ROPE_BASE, SMEAR_CHANNELS, GPTConfig
from hotlap.model.lora import Adapter, LoRA


class Cache(Protocol):
    """What the model needs of a key-value cache, such as `hotlap.model.decoding.KVCache`."""

    positions: Tensor  # (B, T) of the tokens of this call
    previous_ids: Tensor  # (B, T), the token before each, -1 for the first of a sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


class Linear(nn.Linear):
    """A linear layer without bias, in the dtype of its input, or in fp8 while training if `fp8` is set.

    Master weights stay float32 while training. For inference, `quantize` rounds them to int8 with `scales`.
    `adapter`: of LoRA (lora.py), whose output is added.
    """

    fp8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.adapter: Adapter | None = None
        self.register_buffer("scales", None, persistent=False)

    def quantize(self) -> None:
        """Round the weight to int8, for good."""
        quantized, self.scales = quantize_rows(self.weight)
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        return self.weight if self.scales is None else dequantized(self.weight, self.scales, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.adapter is None else y + self.adapter(x)

    def product(self, x: Tensor) -> Tensor:
        if self.scales is not None:
            return linear(x, self.weight, self.scales)
        if self.fp8 and torch.is_grad_enabled():
            return linear_fp8(x, self.weight)
        return product(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table of float32 weights, whose rows are read in the compute dtype.

    accumulate: add to a gradient that exists in place, as `embedding` says.
    """

    accumulate = False

    def reset_parameters(self) -> None:
        """Nothing: `GPT.init_weights` fills it. For torch's normal values on the meta device, half a second
        goes to importing its compiler.
        """

    def forward(self, ids: Tensor, dtype: torch.dtype, runs: tuple[Tensor, Tensor] | None) -> Tensor:
        return embedding(ids, self.weight, dtype, runs, self.accumulate)


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


class GPT(nn.Module):
    """A GPT of the given shape. Computes in `compute_dtype`; weights are float32 until `for_inference`.

    lora: of its adapters, if `add_adapters` gave it some.
    """

    lora: LoRA | None = None

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config.validate()
        self.compute_dtype = compute_dtype
        self.embedding = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head = Linear(config.width, config.vocab_size)
        kv_width = config.kv_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(i): Embedding(config.vocab_size, kv_width) for i in config.value_embedding_layers}
        )
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

    def for_inference(self) -> GPT:
        """Round all weights to the compute dtype, freeze them, and return self. For whole, unsharded models.

        Forward rounds the weights anyway, so results stay the same to the last bit, but for a few tokens
        (`Block.decode`). Without a cast in each step, bfloat16 weights take half the memory, and a
        decoding step reads 2 bytes a weight instead of 8 (4 read and 2 written by the cast, 2 read by the
        matmul).
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.compute_dtype)
        return self.requires_grad_(False)

    def quantize(self) -> GPT:
        """After `for_inference`: round the matrices of the blocks and the head to int8 (`kernels/int8.py`),
        and return self. Decoding reads half the bytes of bfloat16.
        """
        for block in self.blocks:
            for layer in (block.attention.qkv, block.attention.proj, block.mlp.fc, block.mlp.proj):
                layer.quantize()
        self.head.quantize()
        return self

    def use_fp8(self) -> int:
        """Train the blocks' large enough matmuls in fp8, and return how many there are."""
        layers = [m for m in self.blocks.modules() if isinstance(m, Linear) and fp8_pays(*m.weight.shape)]
        for layer in layers:
            layer.fp8 = True
        return len(layers)

    def set_windows(self, share: float) -> None:
        """Limit each layer to a share of its attention window, in steps of 128 keys; 1 is the whole
        window. A share of less than one key still is one step."""
        for block, window in zip(self.blocks, self.config.windows, strict=True):
            block.attention.window = min(window, -(-max(1, int(share * window)) // 128) * 128)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The first value of each parameter and table, whole, by name. A seed means them in this order."""
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
        if c.residual_scalars:
            yield "residual_scale", torch.linspace(1.15, 1.05, c.layers)
            yield "x0_scale", torch.linspace(0.20, 0.05, c.layers)
        if c.smear:
            yield "smear_gate.weight", uniform(self.smear_gate.weight, 0, 0.02)
            yield "smear_scale", torch.zeros(1)
        if c.backout:
            yield "backout_scale", torch.tensor([0.2])
        for name, module in self.named_modules():
            if isinstance(module, Adapter):
                bound = module.A.shape[1] ** -0.5
                yield f"{name}.A", uniform(module.A, -bound, bound)
                yield f"{name}.B", torch.zeros(module.B.shape)
        yield from zip(("cos", "sin"), rotary_tables(c.context, c.head_dim, ROPE_BASE, device), strict=True)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> GPT:
        """Fill every parameter and table from `seed`, wherever the model lies, and return self.

        write: puts a whole value into a parameter, of which a rank may hold some rows. ValueError names a
        parameter without a first value.
        """
        given = set()
        for name, whole in self.initial_weights(seed):
            module, _, leaf = name.rpartition(".")
            write(getattr(self.get_submodule(module), leaf), whole)
            given.add(name)
        if missing := {name for name, _ in (*self.named_parameters(), *self.named_buffers())} - given:
            raise ValueError(f"{', '.join(sorted(missing))}: no first value; give one in initial_weights")
        return self

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "sum",
        document_start: Tensor | None = None,
        cache: Cache | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in float32, or with targets (B, T) their loss in nats.

        ids: (B, T) integers. targets: -1 where there is no loss. reduction: "sum", "mean", or "none" for (B *
        T,). document_start: (B, T), for rows that pack documents. cache: continue its sequences. only: (n,)
        indices of the T tokens whose logits are wanted, (B, n, V).
        """
        x = self.hidden(ids, document_start, cache)
        if targets is None:
            return self.logits(x if only is None else x[:, only])
        return linear_cross_entropy(
            x.flatten(0, 1), self.head.whole(x.dtype), targets.flatten(), self.config.softcap, reduction
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's softcapped logits (B, T, V) in float32."""
        return softcap_logits(self.head(hidden), self.config.softcap)

    def hidden(self, ids: Tensor, document_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The normalised residual stream that the head reads: (B, T, D) in the compute dtype."""
        c = self.config
        if not c.document_masks:
            document_start = None
        if cache is None:
            if ids.shape[1] > c.context:
                raise ValueError(f"{ids.shape[1]} tokens are more than the model's context of {c.context}")
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        else:
            cos, sin = self.cos[cache.positions], self.sin[cache.positions]  # (B, T, C/2)
        runs = token_runs(ids, self.embedding.weight)  # sorted once for all tables
        x = rms_norm(self.embedding(ids, self.compute_dtype, runs))  # (B, T, D)
        if c.smear:
            x = self.smeared(x, document_start, cache)
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

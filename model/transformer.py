"""What `GPT` and `GPT2` share: their layers, and what training, decoding and evaluation ask of a model.

A model knows nothing about distribution. It can be built on any device, `meta` included; `init_weights` fills
it.
"""
# B batch, T time, D width, V vocab

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from hotlap.kernels.batch_invariant import product
from hotlap.kernels.cross_entropy import softcap_logits
from hotlap.kernels.decode_linear import linear
from hotlap.kernels.embedding import embedding
from hotlap.kernels.fp8 import fp8_pays, linear_fp8
from hotlap.kernels.int8 import dequantized, quantize_rows
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.model.config import Shape
from hotlap.model.lora import Adapter, LoRA


class Cache(Protocol):
    """What a model needs of a key-value cache, such as `hotlap.model.kv_cache.KVCache`."""

    positions: Tensor  # (B, T) of the tokens of this call
    previous_ids: Tensor  # (B, T), the token before each, -1 for the first of a sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


class Linear(nn.Linear):
    """A linear layer in the dtype of its input, or in fp8 while training if `fp8` is set.

    Master weights stay float32 while training. For inference, `quantize` rounds them to int8 with `scales`.
    `adapter`: of LoRA (lora.py), whose output is added.
    """

    fp8 = False

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias=bias)
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
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

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
        """Nothing: `init_weights` fills it. For torch's normal values on the meta device, half a second goes
        to importing its compiler.
        """

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight, for a head that is tied to it."""
        return self.weight

    def forward(self, ids: Tensor, dtype: torch.dtype, runs: tuple[Tensor, Tensor] | None) -> Tensor:
        return embedding(ids, self.weight, dtype, runs, self.accumulate)


class Transformer(nn.Module):
    """A decoder-only language model. Computes in `compute_dtype`; weights are float32 until `for_inference`.

    A kind of model has `blocks` with the layers attention.qkv, attention.proj, mlp.fc and mlp.proj and an
    attention.window; a `head`; `hidden` and `initial_weights`. lora: of its adapters, if `add_adapters` gave
    it some.
    """

    lora: LoRA | None = None
    blocks: nn.ModuleList
    head: Linear | Embedding

    def __init__(self, config: Shape, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config.validate()
        self.compute_dtype = compute_dtype
        self.embedding = Embedding(config.vocab_size, config.width)

    def for_inference(self) -> Transformer:
        """Round all weights to the compute dtype, freeze them, and return self. For whole, unsharded models.

        Forward rounds the weights anyway, so results stay the same to the last bit, but for a few tokens
        (`Block.decode`). Without a cast in each step, bfloat16 weights take half the memory, and a
        decoding step reads 2 bytes a weight instead of 8 (4 read and 2 written by the cast, 2 read by the
        matmul).
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.compute_dtype)
        return self.requires_grad_(False)

    def quantize(self) -> Transformer:
        """After `for_inference`: round the matrices of the blocks and the head to int8 (`kernels/int8.py`),
        and return self. Decoding reads half the bytes of bfloat16. A head that is tied stays, for its rows
        are embeddings too.
        """
        for block in self.blocks:
            for layer in (block.attention.qkv, block.attention.proj, block.mlp.fc, block.mlp.proj):
                layer.quantize()
        if isinstance(self.head, Linear):
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
        raise NotImplementedError

    def initial_adapters(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The adapters' part of `initial_weights`."""
        for name, module in self.named_modules():
            if isinstance(module, Adapter):
                bound = module.A.shape[1] ** -0.5
                A = torch.empty(module.A.shape, device=generator.device)
                yield f"{name}.A", A.uniform_(-bound, bound, generator=generator)
                yield f"{name}.B", torch.zeros(module.B.shape)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, write: Callable[[Tensor, Tensor], object] = Tensor.copy_):
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
        if isinstance(self.head, Linear):
            return softcap_logits(self.head(hidden), self.config.softcap)
        return softcap_logits(product(hidden, self.head.weight.to(hidden.dtype)), self.config.softcap)

    def hidden(self, ids: Tensor, document_start: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The normalised residual stream that the head reads: (B, T, D) in the compute dtype."""
        raise NotImplementedError

    def check_context(self, ids: Tensor) -> None:
        """Raise ValueError for ids (B, T) of more tokens than the context."""
        if ids.shape[1] > self.config.context:
            raise ValueError(
                f"{ids.shape[1]} tokens are more than the model's context of {self.config.context}"
            )

"""Every operation of the kernels at a small size, with its reference: what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers.kernel_tools import DEVICE, random
from torch import Tensor

from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from hotlap.kernels.decode_attention import append_ref, decode_attention, decode_attention_ref
from hotlap.kernels.decode_linear import linear_residual, linear_residual_ref, norm_linear, norm_linear_ref
from hotlap.kernels.embedding import embedding, embedding_ref
from hotlap.kernels.fp8 import linear_fp8, linear_fp8_ref, linear_relu2_fp8
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from hotlap.kernels.linear_relu2 import linear_relu2, linear_relu2_ref
from hotlap.kernels.muon import (
    muon_apply,
    muon_apply_ref,
    muon_factors,
    muon_factors_ref,
    muon_momentum,
    muon_momentum_ref,
    muon_squares,
    muon_squares_ref,
)
from hotlap.kernels.orthogonalize import orthogonalize, orthogonalize_ref
from hotlap.kernels.qkv import attention_inputs, attention_inputs_ref, rotary_tables
from hotlap.kernels.relu2 import relu2, relu2_ref
from hotlap.kernels.rms_norm import rms_norm, rms_norm_ref, rms_norm_residual, rms_norm_residual_ref

F32 = torch.float32
AUTO = None  # autocast's dtype


class Case(NamedTuple):
    function: Callable
    reference: Callable
    inputs: list[Tensor]
    dtypes: tuple[torch.dtype | None, ...]  # of the results under autocast
    off: float = 0.03  # from float32, as a share


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return random(*shape, seed=seed, dtype=dtype)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return (random(*shape, seed=seed) / shape[-1] ** 0.5).detach().requires_grad_()


def decode(function):
    """Of decode_attention, with caches in the dtype of autocast, as an engine would keep them, or float32."""

    def call(q, k, v, caches):
        slots, lengths = torch.arange(2, device=DEVICE), torch.tensor([3, 5], device=DEVICE)
        with torch.no_grad():
            return function(q, k, v, *caches.clone(), slots, lengths)

    return call


def decode_ref(q, k, v, k_cache, v_cache, slots, lengths):
    append_ref(k, v, k_cache, v_cache, slots, lengths)
    return decode_attention_ref(q, k_cache, v_cache, slots, lengths)


def muon(momentum, squares, factors, apply, orthogonal):
    """A step of Muon on one tall matrix."""

    def call(gradient, matrix):
        with torch.no_grad():
            state, second = torch.zeros(1, 24, 8, device=DEVICE), torch.zeros(1, 24, 1, device=DEVICE)
            beta, lr, decay = (torch.tensor(value, device=DEVICE) for value in (0.9, 0.5, 0.1))
            update = orthogonal(momentum([gradient], state, beta), norm=24**0.5)
            moved = matrix.clone()
            apply([moved], update, factors(squares(update), second, 8, 0.9), lr, decay)
        return moved, state, second

    return call


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Inputs as a model has them under autocast: float32, or of its dtype where a matmul has made them."""
    tables = rotary_tables(6, 16, 1e4, DEVICE)
    ids = torch.tensor([3, 1, 4, 1, 5, 9], device=DEVICE)
    a, b = (torch.tensor(value, device=DEVICE, requires_grad=True) for value in (0.7, 0.3))
    x, made = normal(6, 32), normal(6, 32, dtype=dtype, seed=1)
    heads = [normal(2, 6, n, 16, seed=n) for n in (4, 2, 1)]
    q, k, v = heads[0], heads[1], normal(2, 6, 2, 16, seed=7)
    one = [normal(2, 1, n, 16, seed=n) for n in (4, 2, 2)]
    caches = normal(2, 2, 9, 2, 16, seed=5).detach()
    mlp = [x, weight(64, 32), weight(32, 64)]
    rows = [normal(16, 32), weight(48, 32)]

    def residual(function):
        return lambda x, y, a, b: function(x, y, scales=(a, b))

    def mixed(function):
        return lambda x, w, a, b, y, gate: function(x, w, (a, b, y), gate, True)

    def table(function):
        return lambda w: function(ids, w, F32)

    def loss(function, reduction):
        return lambda x, head: function(x, head, ids, 15.0, reduction)

    found = {
        "rms_norm": Case(rms_norm, rms_norm_ref, [x, normal(32)], (F32,)),
        "rms_norm of a product": Case(rms_norm, rms_norm_ref, [made, normal(32)], (AUTO,)),
        "rms_norm_residual": Case(rms_norm_residual, rms_norm_residual_ref, [made, x], (F32, F32)),
        "rms_norm_residual, scaled": Case(
            residual(rms_norm_residual), residual(rms_norm_residual_ref), [made, x, a, b], (F32, F32)
        ),
        "relu2": Case(relu2, relu2_ref, [x], (F32,)),
        "relu2 of a product": Case(relu2, relu2_ref, [made], (AUTO,)),
        "linear_relu2": Case(linear_relu2, linear_relu2_ref, mlp, (AUTO,)),
        "attention": Case(
            lambda *x: attention(*x, window=3, softcap=5.0),
            lambda *x: attention_ref(*x, window=3, softcap=5.0),
            [q, k, v], (AUTO,),
        ),
        "attention_inputs": Case(
            lambda qkv, gate, e: attention_inputs(qkv, 2, *tables, 1.2, gate, e),
            lambda qkv, gate, e: attention_inputs_ref(qkv, 2, *tables, 1.2, gate, e),
            [normal(2, 6, 8, 16, dtype=dtype), normal(2, 6, 2, dtype=dtype), v], (F32, F32, F32),
        ),
        "decode_attention": Case(decode(decode_attention), decode(decode_ref), [*one, caches], (F32,)),
        "decode_attention, cache of its dtype": Case(
            decode(decode_attention),
            lambda q, k, v, caches: decode(decode_ref)(q, k, v, caches.float()),
            [*one, caches.to(dtype)], (AUTO,),
        ),
        "norm_linear": Case(
            mixed(norm_linear), mixed(norm_linear_ref), [made, weight(48, 32), a, b, x, weight(2, 8)],
            (AUTO, F32, AUTO),
        ),
        "linear_residual": Case(linear_residual, linear_residual_ref, [made, weight(32, 32), x], (F32,)),
        "cross_entropy": Case(
            lambda x: cross_entropy(x, ids, 15.0), lambda x: cross_entropy_ref(x, ids, 15.0), [made], (F32,)
        ),
        "embedding": Case(table(embedding), table(embedding_ref), [normal(11, 32)], (F32,)),
        "linear_fp8": Case(linear_fp8, linear_fp8_ref, rows, (AUTO,), 0.1),
        "linear_relu2_fp8": Case(
            linear_relu2_fp8, linear_relu2_ref, [*rows, weight(32, 48)], (AUTO,), 0.2
        ),
        "muon": Case(
            muon(lambda *x: muon_momentum(*x, F32), muon_squares, muon_factors, muon_apply, orthogonalize),
            muon(muon_momentum_ref, muon_squares_ref, muon_factors_ref, muon_apply_ref, orthogonalize_ref),
            [normal(24, 8).detach(), normal(24, 8, seed=1).detach()], (F32, F32, F32), 1e-3,
        ),
    }  # fmt: skip
    for reduction in ("sum", "mean", "none"):
        functions = (loss(f, reduction) for f in (linear_cross_entropy, linear_cross_entropy_ref))
        found[f"linear_cross_entropy, {reduction}"] = Case(*functions, [x, weight(11, 32)], (F32,))
    return found

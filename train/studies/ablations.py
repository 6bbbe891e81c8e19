"""`hotlap ablations`: train the demo's model without each part of its recipe, at equal training time.

Run it on an otherwise idle machine. Parts that are config fields are changed there; the others are functions,
replaced while a variant trains. Nothing is retuned, except the learning rates of AdamW for the matrices and
of the tied head: they run at several, and the best counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.common import options
from hotlap.common.errors import known
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.common.terminal import printable
from hotlap.kernels.dispatch import default_device
from hotlap.kernels.qkv import attention_inputs
from hotlap.model import gpt
from hotlap.model.gpt import GPT
from hotlap.train.optim import muon_adamw
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.presets import tiny
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.studies import sweep
from hotlap.train.studies.config import AblationsConfig
from hotlap.train.studies.sweep import BASE, Variant

FIELDS = {
    "with value embeddings": "model.value_embeddings=true",
    "no residual scalars": "model.residual_scalars=false",
    "no smear": "model.smear=false",
    "no backout": "model.backout=false",
    "no softcap": "model.softcap=0.0",
    "no document masks": "model.document_masks=false",
    "QK gain 1": "model.qk_gain=1.0",
    "warmdown over 20 %": "schedule.warmdown=0.2",
    "warmdown to 0": "schedule.final_lr=0.0",
    "no learning-rate warm-up": "schedule.warmup_steps=0",
    "momentum 0.95 throughout": "schedule.momentum=[0.95, 0.95, 0.95]",
    "weight decay 0.28": "optim.weight_decay=0.28",
    "batch in three stages": "schedule.stages=[[0.25, 1.0], [0.5, 1.0], [1.0, 1.0]]",
}
ADAMW_RATES = (1e-3, 3e-3, 1e-2)  # learning rates of the matrices
TIED_RATES = (1, 5)  # learning rates of the tied table, as multiples of the head's


def ablate(config: AblationsConfig) -> list[dict]:
    """Train the variants, and return the rows of the table."""
    config.validate()
    variants = ablations(options.merge(tiny(), sweep.assignments(config.base), "--base"))
    chosen = [known(name, variants, "ablation") for name in config.only] or list(variants)
    variants = {name: variants[name] for name in dict.fromkeys((BASE, *chosen))}
    for name in [name for name in variants if name != BASE and variants[name] == variants[BASE]]:
        log.info("%s is left out: the base is already so", name)
        del variants[name]
    log_warnings(default_device())
    return sweep.run_variants(variants, config.seconds, config.seeds, config.out)


def ablations(base: PretrainConfig) -> dict[str, Variant]:
    """All variants by name, the base first."""
    variants = {BASE: Variant(base)}
    for name, text in FIELDS.items():
        variants[name] = Variant(options.merge(base, sweep.assignments(text), name))
    for name, factor in (("half the batch", 0.5), ("twice the batch", 2)):
        changed = dataclasses.replace(base, batch_rows=max(1, round(factor * base.batch_rows)))
        variants[name] = Variant(changed)
    for rate in ADAMW_RATES:
        changed = dataclasses.replace(base, optim=dataclasses.replace(base.optim, matrix_lr=rate))
        variants[f"AdamW at {rate:g} for the matrices"] = Variant(changed, adamw_for_matrices)
    for factor in TIED_RATES:
        rate = factor * base.optim.head_lr
        changed = dataclasses.replace(base, optim=dataclasses.replace(base.optim, embedding_lr=rate))
        variants[f"head tied to the embedding at {rate:g}"] = Variant(changed, tied_head)
    return variants | {
        "random projections": Variant(base, random_projections),
        "GELU": Variant(base, partial(replaced, gpt, "linear_relu2", linear_gelu)),
        "no QK-norm": Variant(base, partial(replaced, gpt, "attention_inputs", rotary_alone)),
        "no rotary": Variant(base, partial(replaced, gpt, "attention_inputs", qk_norm_alone)),
    }


@contextmanager
def replaced(owner: Any, name: str, other: Callable) -> Iterator[None]:
    """Replace a function of a module or class by `other` for the duration."""
    before = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def adamw_for_matrices() -> Iterator[None]:
    """Train the blocks' matrices with AdamW, betas (0.9, 0.95)."""
    groups_of = muon_adamw.parameter_groups

    def groups(*given: object) -> list[dict]:
        found = groups_of(*given)
        return [g | {"muon": False, "betas": (0.9, 0.95)} if g["muon"] else g for g in found]

    def nothing(optimizer: MuonAdamW) -> None:
        """No matrix is orthogonalised, so none is exchanged."""

    with replaced(muon_adamw, "parameter_groups", groups), replaced(MuonAdamW, "_plan_exchange", nothing):
        yield


@contextmanager
def random_projections() -> Iterator[None]:
    """Initialise the projections back to the residual stream as GPT-2 does, not with zeros."""
    original = GPT.initial_weights

    def initial_weights(model: GPT, seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(model.embedding.weight.device).manual_seed(seed + 1)
        deviation = 0.02 / (2 * model.config.layers) ** 0.5
        for name, value in original(model, seed):
            if name.startswith("blocks.") and name.endswith("proj.weight"):
                value = value.to(generator.device).normal_(0, deviation, generator=generator)
            yield name, value

    with replaced(GPT, "initial_weights", initial_weights):
        yield


@contextmanager
def tied_head() -> Iterator[None]:
    """One table is embedding and head. It starts small, like a head; the norm after the embedding rescales
    it.
    """
    build, original = GPT.__init__, GPT.initial_weights

    def __init__(model: GPT, *given) -> None:
        build(model, *given)
        model.head.weight = model.embedding.weight

    def initial_weights(model: GPT, seed: int) -> Iterator[tuple[str, Tensor]]:
        model.head.weight = model.embedding.weight  # leaving the meta device separates them
        generator = torch.Generator(model.embedding.weight.device).manual_seed(seed + 1)
        for name, value in original(model, seed):
            if name == "embedding.weight":
                value.normal_(0, 0.02, generator=generator)
            if name != "head.weight":
                yield name, value

    with replaced(GPT, "__init__", __init__), replaced(GPT, "initial_weights", initial_weights):
        yield


def linear_gelu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up.to(x.dtype))), down.to(x.dtype))


def rotary_alone(
    qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.cat((a * c + b * s, b * c - a * s), dim=-1).to(x.dtype)

    _, _, v = attention_inputs(qkv, kv_heads, cos, sin, *rest)
    q, k = qkv[:, :, : -2 * kv_heads], qkv[:, :, -2 * kv_heads : -kv_heads]
    return rotated(q), rotated(k), v


def qk_norm_alone(
    qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_inputs(qkv, kv_heads, torch.ones_like(cos), torch.zeros_like(sin), *rest)


def main(config: AblationsConfig) -> None:
    """`hotlap ablations`."""
    print(printable(sweep.markdown(ablate(config))))

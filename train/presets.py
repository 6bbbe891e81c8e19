"""Ready configurations: plain functions that return one."""

from __future__ import annotations

import math
from pathlib import Path

from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, parameter_counts
from hotlap.train.loop import LoopConfig
from hotlap.train.optim import OptimConfig
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.schedule import ScheduleConfig
from hotlap.train.sft import SFTConfig

REFERENCE_DEPTH = 12  # where nanochat's rates were tuned
REFERENCE_BATCH = 1 << 19  # tokens


def shakespeare_char() -> PretrainConfig:
    """Characters of Shakespeare on two cores: nanoGPT's CPU recipe, and a race with it."""
    model = GPTConfig(
        vocab_size=128, context=128, layers=4, width=128, heads=2, kv_heads=2, window_pattern="L",
        value_embeddings=False, residual_scalars=False, backout=False,
    )  # fmt: skip
    return PretrainConfig(
        out=Path("runs/shakespeare-char"), data="shakespeare", tokenizer="characters",
        batch_rows=16, model=model,
        optim=OptimConfig(weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=15, warmdown=0.6, momentum_warmup_steps=45),
        loop=LoopConfig(150, evaluate_every=150, save_every=150),
    )  # fmt: skip


def tiny() -> PretrainConfig:
    """The base model of the demo: minutes on two cores."""
    model = GPTConfig(
        vocab_size=4096, context=256, layers=4, width=192, heads=3, kv_heads=3, window_pattern="L",
        value_embeddings=False,
    )  # fmt: skip
    return PretrainConfig(
        out=Path("runs/tiny/pretrain"), model=model,
        optim=OptimConfig(weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20, momentum_warmup_steps=100),
        loop=LoopConfig(250, evaluate_every=125, save_every=50),
    )  # fmt: skip


def tiny_sft() -> SFTConfig:
    """The fine-tuning of the demo."""
    return SFTConfig(
        out=Path("runs/tiny/sft"), base=Path("runs/tiny/pretrain"),
        schedule=ScheduleConfig(warmup_steps=0, warmdown=0.6, final_lr=0.0, momentum_warmup_steps=100),
        loop=LoopConfig(420, evaluate_every=420, save_every=60),
    )  # fmt: skip


def from_depth(depth: int, vocab_size: int = 32768, context: int = 2048, ratio: float = 12) -> PretrainConfig:
    """nanochat's dial: the depth sets width, tokens, batch, learning rates and weight decay.

    Tokens are `ratio` for each weight of the products; the batch grows with tokens^0.383, the rates with the
    batch's square root, and the weight decay falls as the run gets longer.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    model = GPTConfig.from_depth(depth, vocab_size, context)
    tokens = ratio * weights_in_products(model)
    reference = GPTConfig.from_depth(REFERENCE_DEPTH, vocab_size, context)
    growth = tokens / (ratio * weights_in_products(reference))
    batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383))
    share = (batch / REFERENCE_BATCH) ** 0.5
    rates = OptimConfig()
    optim = OptimConfig(
        **{name: getattr(rates, name) * share
           for name in ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")},
        weight_decay=rates.weight_decay * share / growth,
    )  # fmt: skip
    return PretrainConfig(
        out=Path(f"runs/d{depth}"), model=model, optim=optim,
        batch_rows=batch // context, micro_batch=str(min(32, batch // context)),
        loop=LoopConfig(round(tokens / batch)),
    )  # fmt: skip


def weights_in_products(config: GPTConfig) -> int:
    counts = parameter_counts(meta_model(config))
    return counts["matrices"] + counts["head"]


PRETRAIN = {
    "shakespeare-char": shakespeare_char,
    "tiny": tiny,
    "d12": lambda: from_depth(12),
    "d20": lambda: from_depth(20),
    "d24": lambda: from_depth(24),
}

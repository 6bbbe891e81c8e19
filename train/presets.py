"""Presets: functions that return a ready configuration."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from hotlap.common.checks import TOO_LARGE
from hotlap.model.config import GPTConfig, Shape, counts_of
from hotlap.train.config import (
    DPOConfig,
    GPT2PretrainConfig,
    LoopConfig,
    OptimConfig,
    PretrainConfig,
    SFTConfig,
)
from hotlap.train.data.mixtures import parts_of
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.rl_config import RLConfig

REFERENCE_DEPTH = 12  # where nanochat tuned its learning rates
REFERENCE_BATCH = 1 << 19  # tokens
BATCH_EXPONENT = 0.383  # of the best batch over the tokens of a run
DEEPEST = 1000  # far beyond where the rules were tried: 50 trillion parameters
RATES = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "adamw_lr")

FINEWEB_VALIDATION = 10_485_760  # tokens, by the track's rules
GPT2_TOKENS = 1.15e9  # of the gpt2-124m run
GPT2_MATMUL_PARAMETERS = 12 * 12 * 768**2 + 50304 * 768


def shakespeare_char() -> PretrainConfig:
    """A character model of Shakespeare for two cores, of the size of nanoGPT's recipe for CPUs. It ends
    where it is a little better than that.
    """
    model = GPTConfig(
        vocab_size=128, context=128, layers=4, width=128, heads=2, kv_heads=2, window_pattern="L",
        bigram_rows=8192, residual_scalars=False, backout=False,
    )  # fmt: skip
    return PretrainConfig(
        out=Path("runs/shakespeare-char"), data="shakespeare", tokenizer="characters",
        batch_rows=16, model=model,
        optim=OptimConfig(matrix_lr=0.03, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=15, warmdown=0.6, momentum_warmup_steps=45),
        loop=LoopConfig(90, evaluate_every=90, save_every=90),
    )  # fmt: skip


def tiny() -> PretrainConfig:
    """The demo's base model: minutes on two CPU cores."""
    model = GPTConfig(
        vocab_size=4096, context=256, layers=4, width=192, heads=3, kv_heads=3, window_pattern="L",
        value_embeddings=False,
    )  # fmt: skip
    return PretrainConfig(
        out=Path("runs/tiny/pretrain"), model=model,
        # at nanochat's 0.5, the scalars turn the residual stream to zero within the warmup: the loss spikes
        optim=OptimConfig(weight_decay=0.0, scalar_lr=0.1),
        schedule=ScheduleConfig(warmup_steps=20, momentum_warmup_steps=100),
        loop=LoopConfig(250, evaluate_every=125, save_every=50),
    )  # fmt: skip


def tiny_sft() -> SFTConfig:
    """The demo's fine-tuning."""
    return SFTConfig(
        out=Path("runs/tiny/sft"), base=Path("runs/tiny/pretrain"),
        schedule=ScheduleConfig(warmup_steps=0, warmdown=0.6, final_lr=0.0, momentum_warmup_steps=100),
        loop=LoopConfig(480, evaluate_every=480, save_every=60),
    )  # fmt: skip


def from_depth(depth: int, vocab_size: int = 32768, context: int = 2048, ratio: float = 12) -> PretrainConfig:
    """nanochat's rules: the depth sets width, tokens, batch, learning rates and weight decay.

    A run has `ratio` tokens per matmul parameter. The batch grows with tokens^0.383 and the learning rates
    with the square root of the batch; weight decay falls as the run gets longer.
    """
    check_depth(depth)
    model = GPTConfig.from_depth(depth, vocab_size, context)
    tokens = ratio * matmul_parameters(model)
    reference = GPTConfig.from_depth(REFERENCE_DEPTH, vocab_size, context)
    growth = tokens / (ratio * matmul_parameters(reference))
    batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**BATCH_EXPONENT))
    share = (batch / REFERENCE_BATCH) ** 0.5
    steps = round(tokens / batch)
    if context > batch:
        raise ValueError(f"context={context} must be at most the {batch} tokens of a step at depth {depth}")
    if not 1 <= steps < TOO_LARGE:
        raise ValueError(f"ratio={ratio} gives {steps} steps; there must be at least 1, and less than 2^63")
    optim = scaled(OptimConfig(), share, OptimConfig().weight_decay * share / growth)
    return PretrainConfig(
        out=Path(f"runs/d{depth}"), model=model, optim=optim,
        batch_rows=batch // context, micro_batch=str(min(32, batch // context)),
        loop=LoopConfig(steps),
    )  # fmt: skip


def portable(config: PretrainConfig) -> PretrainConfig:
    """The recipe without the extras of its model, which other programs can then run (docs/interop.md)."""
    name, *below = config.out.relative_to("runs").parts
    model = dataclasses.replace(
        config.model, window_pattern="L", bigram_rows=0, value_embeddings=False, residual_scalars=False,
        smear=False, backout=False, softcap=0.0,
    )  # fmt: skip
    return dataclasses.replace(config, out=Path("runs", f"{name}-portable", *below), model=model)


def check_depth(depth: int) -> None:
    if not 1 <= depth <= DEEPEST:
        raise ValueError(f"depth={depth} must be from 1 to {DEEPEST}")


def gpt2_124m() -> PretrainConfig:
    """modded-nanogpt's main track: 124M matmul parameters to a loss of 3.28 nats per token on FineWeb.

    GPT-2's shape, with learning rates by nanochat's rules for the batch and the length of the run. Batch and
    attention windows grow in three stages, from a third and a quarter, as in the records since 2025.
    """
    rules = from_depth(12, vocab_size=50304, ratio=GPT2_TOKENS / GPT2_MATMUL_PARAMETERS)
    batch_rows = 192  # 393,216 tokens
    share = (batch_rows / rules.batch_rows) ** 0.5
    stages = ((1 / 3, 1 / 4), (2 / 3, 1 / 2), (1.0, 1.0))
    steps = round(GPT2_TOKENS / (sum(rows for rows, _ in stages) / len(stages) * batch_rows * 2048))
    return dataclasses.replace(
        rules, out=Path("runs/gpt2-124m"), data="data/fineweb", batch_rows=batch_rows, micro_batch="auto",
        optim=scaled(rules.optim, share),
        schedule=ScheduleConfig(stages=stages, momentum_warmup_steps=300),
        loop=LoopConfig(steps, evaluate_every=500, save_every=500),
        validation_tokens=FINEWEB_VALIDATION,
    )  # fmt: skip


def gpt2_classic() -> GPT2PretrainConfig:
    """nanoGPT's GPT-2 (124M): OpenAI's architecture, here with its biases, and AdamW. On FineWeb in place of
    OpenWebText, whose rows are cut anywhere and not masked at the ends of documents.
    """
    steps, warmup = 600_000, 2000
    return GPT2PretrainConfig(
        out=Path("runs/gpt2-classic"), data="data/fineweb",
        batch_rows=480, micro_batch="auto",  # 491,520 tokens
        optim=OptimConfig(adamw_lr=6e-4, weight_decay=0.1),
        schedule=ScheduleConfig(
            warmup_steps=warmup, warmdown=1 - warmup / steps, final_lr=0.1, decay="cosine"
        ),
        loop=LoopConfig(steps, evaluate_every=1000, save_every=1000, clip=1.0),
        validation_tokens=FINEWEB_VALIDATION,
    )  # fmt: skip


def gpt2_grade(depth: int = 24) -> PretrainConfig:
    """nanochat's speedrun to GPT-2 (1.5B) grade: 8 tokens per matmul parameter."""
    rules = from_depth(depth, ratio=8)
    return dataclasses.replace(
        rules, out=Path("runs/gpt2-grade/pretrain"), data="data/climbmix", micro_batch="auto",
        loop=dataclasses.replace(rules.loop, evaluate_every=250, save_every=500),
        validation_tokens=80 * REFERENCE_BATCH,
    )  # fmt: skip


# What nanochat fine-tunes on, and our own tasks in place of its spelling and identity.
TALKS = ("smoltalk", "mmlu:3", "gsm8k:4", "spelling", "arithmetic", "greetings")


def gpt2_grade_sft(base: PretrainConfig, talks: tuple[str, ...] = TALKS) -> SFTConfig:
    """Fine-tuning for gpt2_grade: one epoch of the mixture. talks: as SFTConfig.data.

    With SmolTalk, as in nanochat. Other data is mostly small and gets at least 500 steps of 16 rows.
    """
    config = SFTConfig(
        out=Path("runs/gpt2-grade/sft"), base=base.out, data=talks, epochs=1,
        loop=LoopConfig(500, evaluate_every=200, save_every=200),
    )  # fmt: skip
    if all(part.name != "smoltalk" for part in parts_of(talks)):
        return config
    # The batch size is pretraining's: at 1M tokens a step, the mixture's 0.5B tokens take about 500 steps.
    # The rates are 0.8 of those at the reference batch: nanochat scales them in pretraining only.
    return dataclasses.replace(
        config, batch_rows=base.batch_rows, optim=scaled(OptimConfig(), 0.8, decay=0.0),
        schedule=ScheduleConfig(
            warmup_steps=0, warmdown=0.5, final_lr=0.0, momentum=(0.85, 0.95, 0.95), momentum_warmup_steps=300
        ),
        loop=dataclasses.replace(config.loop, steps=1),  # epochs=1 determines the steps
    )  # fmt: skip


PAIRS = ("ultrafeedback",)
PROMPTS = ("gsm8k",)
GSM8K_STEPS = 7473 // 16  # one pass over its questions


def gpt2_grade_dpo(sft: SFTConfig, pairs: tuple[str, ...] = PAIRS) -> DPOConfig:
    """Preference training after gpt2_grade_sft: one epoch of the pairs, of which UltraFeedback has about four
    in a row of 2 x 2,048 tokens. nanochat has no such stage; the rates are a fiftieth of fine-tuning's.
    """
    return DPOConfig(
        out=Path("runs/gpt2-grade/dpo"), base=sft.out, data=pairs, batch_rows=32, beta=0.5,
        optim=scaled(sft.optim, 0.02, decay=0.0),
        schedule=dataclasses.replace(sft.schedule, warmup_steps=20, warmdown=0.9),
        loop=LoopConfig(1, evaluate_every=100, save_every=100),  # epochs=1 determines the steps
    )  # fmt: skip


def gpt2_grade_rl(sft: SFTConfig, prompts: tuple[str, ...] = PROMPTS) -> RLConfig:
    """Reinforcement learning after gpt2_grade_sft, as in nanochat: 16 answers of at most 256 tokens to each
    of 16 questions a step, at a twentieth of fine-tuning's rates, which fall to 0 from the first step on.
    """
    return RLConfig(
        out=Path("runs/gpt2-grade/rl"), base=sft.out, data=prompts, batch_rows=256, samples=16,
        max_tokens=256, resample=0, optim=scaled(sft.optim, 0.05, decay=0.0),
        schedule=dataclasses.replace(sft.schedule, warmdown=1.0),
        loop=LoopConfig(GSM8K_STEPS, evaluate_every=60, save_every=60),
    )  # fmt: skip


def scaled(optim: OptimConfig, share: float, decay: float | None = None) -> OptimConfig:
    """optim with its learning rates and weight decay multiplied by `share`. decay: replaces the latter."""
    rates = {name: getattr(optim, name) * share for name in RATES}
    return OptimConfig(**rates, weight_decay=optim.weight_decay * share if decay is None else decay)


def matmul_parameters(config: Shape) -> int:
    """Number of parameters in matmuls: all but embeddings and scalars."""
    return counts_of(config)["matmul"]


PRETRAIN = {
    "shakespeare-char": shakespeare_char,
    "tiny": tiny,
    "gpt2-124m": gpt2_124m,
    "gpt2-classic": gpt2_classic,
    "d12": lambda: from_depth(12),
    "d20": lambda: from_depth(20),
    "d24": lambda: from_depth(24),
    "tiny-portable": lambda: portable(tiny()),
    "d12-portable": lambda: portable(from_depth(12)),
    "d24-portable": lambda: portable(from_depth(24)),
}

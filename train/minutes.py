"""The best model of a fixed time: which depth, context and batch suit the work that a device does in it."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import torch

from hotlap.model.config import GPTConfig
from hotlap.model.flops import nanochat_flops
from hotlap.model.gpt import GPT
from hotlap.train.data import Batch
from hotlap.train.dist import World
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.parallel import materialize, parallelize
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.runs import compute_dtype
from hotlap.train.schedule import ScheduleConfig

VOCABULARY = 8192
NO_LIMIT = 1_000_000  # steps: the clock ends the run
TRIAL = GPTConfig.from_depth(4, VOCABULARY, 512)
TRIAL_SECONDS = 3.0

# FLOPs of a run, and the depth, context and tokens of a step that gave the best bits per byte of those tried.
# Between the rows, depth and tokens are interpolated over the logarithm of the FLOPs, and rounded down.
BEST = (
    # A minute or two of two CPU cores on `pydocs`: 1.413, and 1.414 with half the tokens a step; 3 layers of
    # 256 had 1.586 with 4,096 tokens a step and 1.694 with 8,192, 4 layers 1.714 (a run each).
    (2e13, 2, 512, 1 << 13),
    (1.2e17, 8, 2048, 1 << 19),  # karpathy/autoresearch's baseline: 300 s of an H100, 0.9979 bits per byte
)


def trial_flops(world: World, dtype: str) -> float:
    """FLOP/s that this device reaches in steps of a small model, as training takes them."""
    with torch.device("meta"):
        model = GPT(TRIAL, compute_dtype(dtype, world.device))
    parallelize(model, world, "none", compile=False)
    materialize(model, world.device, 0)
    optimizer = MuonAdamW(model, OptimConfig())
    rows = 32 if world.device.type == "cuda" else 4
    ids = torch.randint(TRIAL.vocab_size, (rows, TRIAL.context), device=world.device)
    batch, steps, seconds = Batch(ids, ids, torch.zeros_like(ids)), 0, 0.0
    while seconds < TRIAL_SECONDS:
        began = time.perf_counter()
        next_token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        (seconds,) = world.total(seconds + taken if world.leads and steps else 0.0)
        steps += 1
        if steps == 1:
            seconds = 0.0  # the first one compiles kernels
    return nanochat_flops(model) * ids.numel() * world.size * (steps - 1) / seconds


def best_shape(flops: float) -> tuple[int, int, int]:
    """Depth, context and tokens of a step for a run of so many FLOPs, from the table."""
    (low, depth, context, tokens), (high, deepest, longest, most) = next(
        (a, b) for a, b in itertools.pairwise(BEST) if flops < b[0] or b is BEST[-1]
    )
    place = max(0.0, math.log(flops / low) / math.log(high / low)) + 1e-9  # rows are not rounded down
    return (
        int(depth + place * (deepest - depth)),
        context if place < 0.5 else longest,
        1 << int(math.log2(tokens) + place * math.log2(most / tokens)),
    )


def timed(out: Path, data: str, minutes: float, flops: float) -> PretrainConfig:
    """The run of so many minutes on a device that does `flops` FLOP/s."""
    depth, context, tokens = best_shape(60 * minutes * flops)
    return PretrainConfig(
        out=out, data=data, model=GPTConfig.from_depth(depth, VOCABULARY, context),
        batch_rows=max(1, tokens // context), micro_batch="auto",
        schedule=ScheduleConfig(warmup_steps=20, final_lr=0.0, momentum_warmup_steps=200),
        loop=LoopConfig(NO_LIMIT, NO_LIMIT, NO_LIMIT, minutes=minutes),
    )  # fmt: skip

"""The best model of a fixed time: which depth, context and batch suit the work that a device does in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.common import options
from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.gpt import GPT
from hotlap.train.data.prepare import CLIMBMIX_TOKENS, TOKENIZER_SHARDS, climbmix_with_tokenizer
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import Dtype, compute_dtype, materialize, parallelize
from hotlap.train.distributed.world import World, joined
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.presets import REFERENCE_BATCH
from hotlap.train.pretrain import MOST_EPOCHS, PretrainConfig, pretrain
from hotlap.train.run.folder import CONFIG
from hotlap.train.speedruns.plan import confirm, download_words, plan
from hotlap.train.speedruns.records import with_a_loss
from hotlap.train.speedruns.result import draw_comparison, show_report, write_result

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
    batch, steps, seconds = Batch(ids, ids, torch.zeros_like(ids), ids.numel()), 0, 0.0
    while seconds < TRIAL_SECONDS:
        began = time.perf_counter()
        next_token_loss(model, batch)[0].backward()
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


@dataclass(frozen=True)
class MinutesConfig:
    """The best bits per byte that this device reaches in a fixed time: karpathy/autoresearch's protocol."""

    out: Path = Path("runs/minutes")
    """Directory of the run."""
    minutes: float = 5.0
    """Of training; start-up, compilation and validation are not counted."""
    data: str = "climbmix"
    """climbmix, pydocs, shakespeare, text or .jsonl files, or a folder of shards."""
    dtype: Dtype = "auto"
    """What the model computes in."""
    yes: bool = False
    """Do not ask before it starts."""


def minutes_speedrun(config: MinutesConfig) -> dict:
    """The best model of a fixed time, and its result.

    The protocol with climbmix: a vocabulary of 8,192, and bits per byte on the first 40 x 524,288 tokens of
    ClimbMix's last shard.
    """
    with joined() as world:
        hub, data = config.data == "climbmix", config.data
        flops = trial_flops(world, config.dtype)
        if hub:
            data = f"data/climbmix-{VOCABULARY}"
        recipe = dataclasses.replace(
            timed(config.out, data, config.minutes, flops), dtype=config.dtype, resume="auto",
            validation_tokens=40 * REFERENCE_BATCH if hub else 0,
        )  # fmt: skip
        recipe = as_begun(recipe).validate()
        tokens = 60 * config.minutes * flops / nanochat_flops(meta_model(recipe.model))
        shards = max(TOKENIZER_SHARDS, math.ceil(tokens / CLIMBMIX_TOKENS))
        download = download_words("climbmix", Path(data), shards, world) if hub else "nothing"
        title = f"the best model of {config.minutes:g} minutes on {config.data}"
        lines = plan(recipe, world, download)
        lines["length"] += f", about {tokens / 1e6:,.1f}M tokens at the {flops / 1e12:.3g} TFLOP/s measured"
        lines["length"] += f"; but at most {MOST_EPOCHS} times through a corpus of one shard"
        if not confirm(title, lines, config.yes, world):
            return {}
        if hub:
            with world.leader_first("climbmix"):
                if world.leads:
                    climbmix_with_tokenizer(Path(data), shards, VOCABULARY)
        last = pretrain(recipe)
        result = {
            "bpb": last["validation_bpb"], "depth": recipe.model.layers, "minutes": config.minutes,
            "seconds": last["seconds"], "tokens": last["tokens"], "data": config.data,
        }  # fmt: skip
        if world.leads:
            records = with_a_loss("minutes") if hub else []
            draw_comparison([config.out], records, "validation_bpb", config.out / "curves.png")
            write_result(config.out, title, result)
    return result


def as_begun(recipe: PretrainConfig) -> PretrainConfig:
    """The recipe in the shape that its run has, if it was begun when the device was measured otherwise."""
    path = recipe.out / CONFIG
    if not path.exists():
        return recipe
    saved = json.loads(path.read_text(encoding="utf-8"))
    return dataclasses.replace(
        recipe, model=GPTConfig.from_dict(saved["model"]), batch_rows=saved["batch_rows"]
    )


def main(arguments: list[str]) -> None:
    """`hotlap speedrun minutes`."""
    config = options.parse(MinutesConfig, arguments, command="speedrun minutes")
    if minutes_speedrun(config):
        show_report(config.out)

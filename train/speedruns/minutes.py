"""karpathy/autoresearch's speedrun: the best bits per byte that a device reaches in a fixed time.

Depth, context, batch and vocabulary are chosen from the FLOP/s that a short trial measures, and from the size
of the corpus: `shapes.py` has the table.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch

from hotlap.common.files import read_object, write_object
from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.gpt import GPT
from hotlap.model.weights import CONFIG, STATE, run_checkpoints
from hotlap.train.config import MOST_EPOCHS, OptimConfig, PretrainConfig
from hotlap.train.data.prepare import CLIMBMIX_TOKENS, TOKENIZER_SHARDS, climbmix_with_tokenizer
from hotlap.train.data.rows import Batch
from hotlap.train.data.sources import TEXTS, shard_folder
from hotlap.train.distributed.sharding import compute_dtype, materialize, parallelize
from hotlap.train.distributed.world import World, joined
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.presets import REFERENCE_BATCH
from hotlap.train.pretrain import pretrain
from hotlap.train.run.changes import changes
from hotlap.train.run.folder import read_config
from hotlap.train.speedruns.config import MinutesConfig
from hotlap.train.speedruns.corpora import CORPORA
from hotlap.train.speedruns.plan import confirm, download_words, plan
from hotlap.train.speedruns.record_claims import lacks
from hotlap.train.speedruns.record_file import (
    CEILINGS,
    RECORD,
    ceilings,
    run_entry,
    summary,
    write_record,
)
from hotlap.train.speedruns.records import MINUTES, of_recipe
from hotlap.train.speedruns.result import write_result
from hotlap.train.speedruns.shapes import TrainingShape, best_shape, own_rows_and_corpus, passes

VOCABULARY = 8192
BIGRAM_ROWS = 1 << 18
MOST_PASSES = 8  # over a single shard
NO_LIMIT = 1_000_000  # steps: the clock ends the run
TRIAL = GPTConfig.from_depth(4, VOCABULARY, 512)
TRIAL_SECONDS = 3.0


def minutes_speedrun(config: MinutesConfig) -> dict:
    """Train and report. Returns the result, or {} if the user declines the plan. All ranks call it.

    On ClimbMix the protocol asks for a vocabulary of 8,192, and bits per byte on the first 40 x 524,288
    tokens of the last shard.
    """
    config.validate()
    folders = run_folders(config)
    with joined() as world:
        hub, data = config.data == "climbmix", config.data
        own, corpus = world.together(lambda: own_rows_and_corpus(data) if world.is_main else None)[0]
        flops = trial_flops(world, config.dtype)
        all_flops = 60 * config.minutes * flops
        shape, why = best_shape(all_flops, corpus, own)
        if hub:
            data = f"data/climbmix-{VOCABULARY}"
            shape = dataclasses.replace(shape, vocab_size=VOCABULARY)
        if (folders[0] / CONFIG).exists():
            why = "as the run was started with"
        recipe = timed(config.out, data, config.minutes, shape, passes(shape, all_flops, corpus))
        recipe = dataclasses.replace(
            recipe, dtype=config.dtype, resume="auto",
            validation_tokens=40 * REFERENCE_BATCH if hub else 0,
        )  # fmt: skip
        recipe = as_begun(dataclasses.replace(recipe, out=folders[0])).validate()
        tokens = all_flops / nanochat_flops(meta_model(recipe.model))
        shards = max(TOKENIZER_SHARDS, math.ceil(tokens / CLIMBMIX_TOKENS))
        download = download_words("climbmix", Path(data), shards, world) if hub else "nothing"
        title = f"the best model in {config.minutes:g} minutes on {config.data}"
        lines = plan(recipe, world, download, config.runs)
        lines["length"] += f", about {tokens / 1e6:,.1f}M tokens at the measured {flops / 1e12:.3g} TFLOP/s"
        lines["length"] += f"; ends after {recipe.most_epochs} epochs if the corpus is a single shard"
        vocabulary = "" if shard_folder(data) else f", vocabulary {recipe.model.vocab_size:,}"
        lines["shape"] = f"{recipe.batch_rows * recipe.model.context:,} tokens a step{vocabulary}: {why}"
        lines["record"] = record_words(config)
        if not confirm(title, lines, config.yes, world):
            return {}
        if hub:
            with world.main_first("climbmix"):
                if world.is_main:
                    climbmix_with_tokenizer(Path(data), shards, VOCABULARY)
        runs = [
            measured(dataclasses.replace(recipe, out=folder, seed=seed), world)
            for seed, folder in enumerate(folders)
        ]
        result = {
            "bpb": statistics.fmean(last["validation_bpb"] for last in runs), "runs": config.runs,
            "depth": recipe.model.layers, "minutes": config.minutes,
            "seconds": statistics.fmean(last["seconds"] for last in runs),
            "tokens": statistics.fmean(last["tokens"] for last in runs), "data": config.data,
        }  # fmt: skip
        if world.is_main:
            more = record_lines(config, recipe, folders, runs)
            records = of_recipe(MINUTES) if hub else []
            write_result(config.out, title, result, folders, records, more=more)
    return result


def run_folders(config: MinutesConfig) -> list[Path]:
    """A single run is --out itself; several are folders in it."""
    if config.runs == 1:
        return [config.out]
    if (config.out / CONFIG).exists():
        raise ValueError(f"{config.out} is a single run; choose another --out for --runs {config.runs}")
    return [config.out / f"run-{seed}" for seed in range(config.runs)]


def measured(recipe: PretrainConfig, world: World) -> dict[str, float]:
    """Train, and return the last metrics. The device is measured before and after, and what that shows is
    kept in the run's folder. A run that was complete keeps what it has.
    """
    before = world.together(lambda: None if complete(recipe.out) else ceilings(world))[0]
    last = pretrain(recipe)
    if before:
        after = world.together(lambda: ceilings(world))[0]
        if world.is_main:
            write_object(recipe.out / CEILINGS, {"before": before, "after": after})
    return last


def complete(run: Path) -> bool:
    checkpoints = run_checkpoints(run)
    return bool(checkpoints) and bool(read_object(checkpoints[-1] / STATE).get("finished"))


def record_words(config: MinutesConfig) -> str:
    """The line of the plan about the record, and what would make it a row of the table."""
    if config.data not in CORPORA:
        return f"none: {config.data} is no corpus of the race ({', '.join(CORPORA)})"
    lacking = lacks(config.minutes, config.runs)
    return f"{config.out / RECORD}" + (f", no row of the table: {lacking}" if lacking else "")


def record_lines(
    config: MinutesConfig, recipe: PretrainConfig, folders: list[Path], runs: list[dict]
) -> list[str]:
    """Write record.json if there can be one. Returns what to say of it."""
    if config.data not in CORPORA:
        return [f"Record: {record_words(config)}."]
    if missing := [folder for folder in folders if not (folder / CEILINGS).exists()]:
        return [f"Record: none, as the speed of the device was not measured with {missing[0]}."]
    data = recipe.out / "data" if config.data in TEXTS else Path(recipe.data)
    pairs = zip(folders, runs, strict=True)
    entries = [run_entry(folder, seed, last) for seed, (folder, last) in enumerate(pairs)]
    record = write_record(config.out, config.data, recipe, data, entries)
    check = f"`hotlap verify {config.out / RECORD}` checks it."
    return [f"{summary(record)}. Record: {record_words(config)}. {check}"]


def trial_flops(world: World, dtype: str) -> float:
    """FLOP/s (nanochat's formula) of all ranks in training steps of a small model."""
    with torch.device("meta"):
        model = GPT(TRIAL, compute_dtype(dtype, world, TRIAL.width))
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
        (seconds,) = world.total(seconds + taken if world.is_main and steps else 0.0)
        steps += 1
        if steps == 1:
            seconds = 0.0  # the first step compiles kernels
    return nanochat_flops(model) * ids.numel() * world.size * (steps - 1) / seconds


def timed(out: Path, data: str, minutes: float, shape: TrainingShape, repeats: float) -> PretrainConfig:
    """The configuration of a run of this many minutes.

    repeats: how often it will read its text, about. Weight decays grow with that, as the text would be learnt
    by heart otherwise. The scalars' rate falls with the root of the batch: at half a million tokens' rate, on
    some seeds they wander so far that the blocks learn less.
    """
    repeats, plain = min(MOST_PASSES, round(repeats)), OptimConfig()
    optim = dataclasses.replace(
        plain, weight_decay=repeats * plain.weight_decay, adamw_decay=repeats * plain.adamw_decay,
        scalar_lr=plain.scalar_lr * (shape.step_tokens / REFERENCE_BATCH) ** 0.5,
    )  # fmt: skip
    return PretrainConfig(
        out=out, data=data, model=dataclasses.replace(shape.model, bigram_rows=BIGRAM_ROWS),
        batch_rows=shape.batch_rows, micro_batch="auto", most_epochs=MOST_PASSES, optim=optim,
        schedule=ScheduleConfig(warmup_steps=20, final_lr=0.0, momentum_warmup_steps=200),
        loop=LoopConfig(NO_LIMIT, NO_LIMIT, NO_LIMIT, minutes=minutes),
    )  # fmt: skip


def as_begun(recipe: PretrainConfig) -> PretrainConfig:
    """The recipe as its run was started, whatever the speed is now and the recipe was then.

    ValueError if the run has another length: it may be extended, but is no result of this time then.
    """
    if not (recipe.out / CONFIG).exists():
        return recipe
    saved = read_config(recipe.out)
    if "loop.minutes" in (found := changes(saved, recipe)):
        raise ValueError(f"{recipe.out}: {found['loop.minutes']}; choose another --out")
    return dataclasses.replace(
        recipe, model=GPTConfig.from_dict(saved["model"]), batch_rows=saved["batch_rows"],
        optim=OptimConfig(**saved["optim"]), most_epochs=saved.get("most_epochs", MOST_EPOCHS),
    )  # fmt: skip


def main(config: MinutesConfig) -> None:
    """`hotlap speedrun minutes`."""
    minutes_speedrun(config)

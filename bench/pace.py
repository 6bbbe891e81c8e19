"""`hotlap bench speedrun`: a speedrun's training step on this machine, beside the records.

It is measured like `hotlap bench training`, at the recipe's shape. A step of several micro-batches is counted
as that many forward and backward passes and one optimizer step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hotlap.bench import results
from hotlap.bench.cases import start_afresh
from hotlap.bench.config import SpeedrunConfig
from hotlap.bench.plots import draw
from hotlap.bench.training import Batches, check_sizes, measure_training, random_batches
from hotlap.common.errors import known
from hotlap.common.log import log
from hotlap.common.machine import device_name, log_warnings
from hotlap.common.terminal import printable
from hotlap.kernels.dispatch import default_device
from hotlap.model.config import GPT2_BOS, GPTConfig
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.train.data.rows import Batch, PackedRows, prefetched, step_batches
from hotlap.train.data.shards import shard_documents, shard_paths
from hotlap.train.distributed.world import World, joined
from hotlap.train.presets import PRETRAIN, gpt2_grade, matmul_parameters
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.speedruns.records import (
    GOALS,
    GPT2_GRADE,
    RECORDS,
    SIX_N,
    Record,
    dollars_per_hour,
    of_recipe,
    throughput,
)

RECIPES: dict[str, Callable[[], PretrainConfig]] = PRETRAIN | {GPT2_GRADE: gpt2_grade}
ASSUMES = (
    "every step takes as long as those measured; validation, checkpoints and compilation are not counted; "
    "and the recipe's tokens suffice to reach the goal, which only a run shows"
)


def bench_speedrun(config: SpeedrunConfig) -> list[dict]:
    """Measure, write speedrun.json, .csv and .png, and return the rows: ours, then the records."""
    on_gpu = default_device().type == "cuda"
    name = config.recipe or (GPT2_GRADE if on_gpu else "tiny")
    recipe = RECIPES[known(name, RECIPES, "recipe")]()
    config.validate()
    check_sizes(name, recipe.model, config.rows or 1, config.steps)
    batches = shard_batches(config.data) if config.data else random_batches
    with joined() as world:
        path = results.open_file("speedrun", config.out, world.device) if world.is_main else None
        if path:
            log_warnings(world.device)
        compiled = on_gpu if config.compile == "auto" else config.compile == "on"
        rows, found = measure_that_fits(recipe, config, compiled, batches, world)
        ours = our_row(name, recipe, rows, found, world)
        table = [ours, *(record_row(t, ours, recipe.model) for t in compared_with(name))]
        if path:
            results.save(
                path, table, world.device, assumes=ASSUMES, expected=expected_throughput(recipe, world)
            )
            unit = "tokens/s" if of_recipe(goal(name)) else "TFLOP/s"
            draw(path, partial(bars, unit))
            log.info("written to %s", path)
    return table


def goal(name: str) -> str:
    """The speedrun that a preset belongs to."""
    return {"d24": GPT2_GRADE}.get(name, name)


def compared_with(name: str) -> list[Record]:
    """The records of a recipe; if it has none, all records, to compare by FLOP/s."""
    return of_recipe(goal(name)) or list(RECORDS)


def measure_that_fits(
    recipe: PretrainConfig, config: SpeedrunConfig, compiled: bool, batches: Batches, world: World
) -> tuple[int, dict]:
    """The rows per forward pass that fit, and the result of measure_training with them."""
    per_rank = max(1, recipe.batch_rows // world.size)
    wanted = int(recipe.micro_batch) if recipe.micro_batch.isdigit() else per_rank
    rows = config.rows or min(wanted, per_rank)
    while True:
        try:
            return rows, measure_training(recipe.model, rows, config.steps, compiled, world, batches)
        except torch.OutOfMemoryError:
            if config.rows or rows == 1 or world.size > 1:  # the other ranks wait for this one
                raise MemoryError(f"{rows} rows do not fit in memory; give fewer with --rows") from None
        log.info("%d rows do not fit in memory; trying %d", rows, rows // 2)
        rows //= 2
        start_afresh(world.device)


def our_row(name: str, recipe: PretrainConfig, rows: int, found: dict, world: World) -> dict:
    """The row of a whole step and run of the recipe, computed from the measured parts of a step."""
    context = recipe.model.context
    passes = max(1, round(recipe.batch_rows / (rows * world.size)))
    each = sum(found[f"{part}_ms"] for part in ("data_wait", "passes"))
    ms = passes * each + found["optimizer_ms"]
    speed = 1e3 * passes * rows * world.size * context / ms
    share = speed / found["tokens_per_second"]  # the optimizer runs once per step, not once per pass
    tokens = recipe.tokens
    seconds = tokens / speed
    price = dollars_per_hour(device_name(world.device), world.size)
    return {
        "case": f"{name} {passes}x{rows}x{context}", "provider": "hotlap",
        "device": device_name(world.device), "gpus": world.size, "ms": ms,
        "tokens_per_second": speed, "tokens_per_second_each": speed / world.size,
        "tflops_each": found["tflops"] * share,
        "mfu": found["mfu_nanochat"] and found["mfu_nanochat"] * share, "formula": "nanochat's",
        "mfu_causal": found["mfu_causal"] and found["mfu_causal"] * share, "memory_gb": found["memory_gb"],
        "tokens": tokens, "seconds": seconds, "dollars": price and price[0] * seconds / 3600,
        "first_step_s": found["first_step_s"],
    }  # fmt: skip


def record_row(record: Record, ours: dict, shape: GPTConfig) -> dict:
    """The row of a record, with our ratio to it per GPU: in FLOP/s, and in tokens/s for the same recipe.
    FLOPs are 6N for both if the record does not state its attention.
    """
    each = record.tokens_per_second / record.gpus
    same = record.recipe and record.recipe == goal(ours["case"].split()[0])
    flops = nanochat_flops(meta_model(shape))
    theirs = record.flops_per_token
    if record.formula == SIX_N:
        flops = 6 * matmul_parameters(shape)
    elif record.nanochat_mfu:
        theirs *= record.nanochat_mfu / record.mfu
    return {
        "case": ours["case"], "provider": f"{record.project} {record.name}", "device": record.device,
        "gpus": record.gpus, "ms": record.ms_per_step, "tokens_per_second": record.tokens_per_second,
        "tokens_per_second_each": each, "tflops_each": theirs * each / 1e12, "mfu": record.mfu,
        "formula": record.formula, "tokens": record.tokens, "seconds": record.seconds,
        "our_tokens_per_gpu": ours["tokens_per_second_each"] / each if same else None,
        "our_flops_per_gpu": ours["tokens_per_second_each"] * flops / (each * theirs),
        "our_seconds_for_its_tokens": record.tokens / ours["tokens_per_second"] if same else None,
        "source": record.source,
    }  # fmt: skip


def expected_throughput(recipe: PretrainConfig, world: World) -> dict | None:
    """The throughput to expect of these GPUs, going by the records."""
    found = throughput(device_name(world.device), world.size, nanochat_flops(meta_model(recipe.model)))
    return found and dataclasses.asdict(found)


def summary(rows: list[dict]) -> list[str]:
    """The table, and the projected time of a run with what it assumes."""
    columns = ["provider", "gpus", "ms", "tokens_per_second_each", "tflops_each", "mfu", "formula", "seconds"]
    ratios = ("our_tokens_per_gpu", "our_flops_per_gpu")
    columns += [ratio for ratio in ratios if any(row.get(ratio) for row in rows)]
    ours = rows[0]
    hours, name = ours["seconds"] / 3600, ours["case"].split()[0]
    line = f"{ours['case']} on {ours['gpus']} x {ours['device']}: {hours:.3g} hours"
    line += f" for {ours['tokens'] / 1e6:,.0f}M tokens"
    line += f" (goal: {GOALS[goal(name)]})" if goal(name) in GOALS else ""
    line += f", about ${ours['dollars']:.2f}" if ours["dollars"] else ""
    return [results.table(rows, columns), "", line, f"Assumes: {ASSUMES}."]


def shard_batches(folder: Path) -> Batches:
    """Batches from a folder of token shards, by the tokenizer in it or else GPT-2's."""
    from hotlap.model.tokenizer import Tokenizer
    from hotlap.model.weights import TOKENIZER

    paths, bos = shard_paths(folder, "train"), GPT2_BOS
    if (folder / TOKENIZER).exists():
        bos = Tokenizer.load(folder / TOKENIZER).bos

    @contextlib.contextmanager
    def batches(shape: GPTConfig, count: int, steps: int, world: World) -> Iterator[Iterator[list[Batch]]]:
        shards = [partial(shard_documents, path, shape.vocab_size, bos) for path in paths]
        rows = PackedRows(shards, shape.context, seed=0)
        steps_ = step_batches(
            rows, batch_rows=count * world.size, micro_rows=count, rank=world.rank, world=world.size
        )
        with contextlib.closing(prefetched(steps_, world.device)) as found:
            yield found

    return batches


def bars(unit: str, figure: Any, rows: list[dict]) -> None:
    """A bar for each row, ours on top: tokens/s or model TFLOP/s per GPU."""
    name, scale = ("tokens_per_second_each", 1e3) if unit == "tokens/s" else ("tflops_each", 1.0)
    figure.set_size_inches(9, 1.6 + 0.3 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        value = row[name] / scale
        axes.barh(place, value, color="C0" if place == 0 else "C7")
        text = f" {value:.3g}" + (f", MFU {row['mfu']:.0%}" if row["mfu"] else "")
        axes.text(value, place, text, va="center", fontsize=7)
    labels = [f"{row['provider']} ({row['gpus']} x {row['device'].split(',')[0]})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    largest = max(row[name] / scale for row in rows)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.25 * largest))
    axes.set_xlabel("thousand tokens/s per GPU" if scale > 1 else "model TFLOP/s per GPU")
    axes.set_title(rows[0]["case"], fontsize=9)


def main(config: SpeedrunConfig) -> None:
    """`hotlap bench speedrun`."""
    print(printable("\n".join(summary(bench_speedrun(config)))))

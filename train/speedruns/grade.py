"""nanochat's speedrun: a base model as good as GPT-2 (1.5B) by CORE, which is then taught to converse."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from hotlap.common import options
from hotlap.train.data.conversations import (
    check_conversations,
    conversations_plan,
    download_conversations,
)
from hotlap.train.data.prepare import CLIMBMIX_TOKENS, climbmix_with_tokenizer
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.command import EvalConfig, evaluate_model
from hotlap.train.presets import gpt2_grade, gpt2_grade_sft
from hotlap.train.pretrain import pretrain
from hotlap.train.sft import fine_tune
from hotlap.train.speedruns.plan import confirm, download_words, plan, plan_words
from hotlap.train.speedruns.records import with_a_loss
from hotlap.train.speedruns.result import draw_comparison, show_report, talk_to, write_result

GPT2_CORE = 0.256525


@dataclass(frozen=True)
class GradeConfig:
    """Train a model as good as GPT-2 (CORE above 0.256525), and teach it to converse: nanochat's speedrun."""

    out: Path = Path("runs/gpt2-grade")
    """Directory of everything that this makes."""
    depth: int = 24
    """Layers; everything else follows from it."""
    data: Path = Path("data/climbmix")
    """Folder of ClimbMix's shards and their tokenizer; what is missing is downloaded and made."""
    talks: str = "smoltalk"
    """Conversations to learn from: smoltalk (which is downloaded) with the tasks, tasks (facts, sums,
    spelling, greetings), or a .jsonl or .parquet file."""
    core_bundle: Path | None = None
    """nanochat's folder eval_bundle; downloaded where none is named."""
    micro_batch: str = "auto"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    fp8: bool = False
    """Run large matmuls in fp8."""
    yes: bool = False
    """Do not ask before it starts."""


def grade_speedrun(config: GradeConfig) -> dict:
    """nanochat's speedrun: tokenizer, pretraining, CORE and bits per byte, conversations; and its scores."""
    recipe = dataclasses.replace(
        gpt2_grade(config.depth), out=config.out / "pretrain", data=str(config.data),
        micro_batch=config.micro_batch, dtype="fp8" if config.fp8 else "auto", resume="auto",
    ).validate()  # fmt: skip
    with joined() as world:
        shards = math.ceil(recipe.tokens / CLIMBMIX_TOKENS)
        check_conversations(config.talks)
        download = download_words("climbmix", config.data, shards, world)
        if world.leads and (talks := conversations_plan(config.talks)):
            download += f"; {plan_words(talks, talks.folder)}"
        title = f"a model of {config.depth} layers to a CORE of {GPT2_CORE} and into conversation"
        lines = plan(recipe, world, download)
        lines["length"] += f"; then conversations from {config.talks}, which the time is without"
        if not confirm(title, lines, config.yes, world):
            return {}
        with world.leader_first("climbmix"):
            if world.leads:
                climbmix_with_tokenizer(config.data, shards, recipe.model.vocab_size)
                download_conversations(config.talks)
        scores_path = config.out / "scores.json"
        last = pretrain(recipe, warm_up=True)
        if not scores_path.exists():
            tasks = EvalConfig(
                recipe.out, ("bpb", "core"), data=config.data, validation_tokens=recipe.validation_tokens,
                core_bundle=config.core_bundle, out=scores_path,
            )  # fmt: skip
            evaluate_model(tasks)
        read = world.together(lambda: json.loads(scores_path.read_text()) if world.leads else None)
        scores = read[0]["scores"]
        talking = dataclasses.replace(
            gpt2_grade_sft(recipe, config.talks), out=config.out / "sft", micro_batch=config.micro_batch,
            resume="auto",
        )  # fmt: skip
        fine_tune(talking)
        core = scores["core"]["core"]
        result = {
            "core": core, "interval": scores["core"]["interval"], "reached": core > GPT2_CORE,
            "bpb": scores["bpb"]["bpb"], "seconds": last["seconds"], "tokens": last["tokens"],
        }  # fmt: skip
        if world.leads:
            draw_comparison(
                [recipe.out], with_a_loss("gpt2-grade"), "validation_bpb", config.out / "curves.png"
            )
            write_result(config.out, title, result)
    return result


def main(arguments: list[str]) -> int:
    """`hotlap speedrun gpt2-grade`."""
    config = options.parse(GradeConfig, arguments, command="speedrun gpt2-grade")
    if not grade_speedrun(config):
        return 0
    show_report(config.out)
    return talk_to(config.out / "sft")

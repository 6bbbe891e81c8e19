"""nanochat's speedrun: a base model that beats GPT-2 (1.5B) on CORE, a chat model, and its report card."""

from __future__ import annotations

import dataclasses
import math

from hotlap.common.files import cache_folder
from hotlap.train.data.prepare import CLIMBMIX_TOKENS, climbmix_with_tokenizer
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.core_bundle import CORE_FOLDER
from hotlap.train.evaluation.kept_scores import kept_scores
from hotlap.train.presets import gpt2_grade
from hotlap.train.pretrain import PretrainConfig, pretrain
from hotlap.train.speedruns.chat_stages import (
    ChatStage,
    asked_of,
    chat_stages,
    check_core,
    check_stage,
    download,
    download_plans,
    later,
    score,
    train_stage,
)
from hotlap.train.speedruns.config import GradeConfig
from hotlap.train.speedruns.plan import confirm, download_words, plan, plan_words
from hotlap.train.speedruns.report_card import write_report_card
from hotlap.train.speedruns.result import talk_to, write_result

GPT2_CORE = 0.256525


def grade_speedrun(config: GradeConfig) -> dict:
    """Train and score all stages. Returns the result, or {} if the user declines the plan. All ranks call it.

    What is done already is neither trained nor scored again.
    """
    config.validate()
    recipe = dataclasses.replace(
        gpt2_grade(config.depth), out=config.out / "pretrain", data=str(config.data),
        micro_batch=config.micro_batch, dtype="fp8" if config.fp8 else "auto", resume="auto",
    ).validate()  # fmt: skip
    stages = chat_stages(config, recipe)
    with joined() as world:
        tasks = asked_of(config.talks, world)
        for stage in stages:
            check_stage(stage, recipe, world)
        check_core(config.core_bundle)
        shards = math.ceil(recipe.tokens / CLIMBMIX_TOKENS)
        title = f"a {config.depth}-layer model with a CORE above {GPT2_CORE}, then a chat model"
        if not confirm(title, grade_plan(config, recipe, stages, tasks, shards, world), config.yes, world):
            return {}
        with world.main_first("download"):
            if world.is_main:
                climbmix_with_tokenizer(config.data, shards, recipe.model.vocab_size)
                download(stages, tasks, config.core_bundle)
        last = pretrain(recipe, warm_up=True)
        base = EvalConfig(
            tasks=("bpb", "core"), data=str(config.data), validation_tokens=recipe.validation_tokens,
            core_bundle=config.core_bundle,
        )  # fmt: skip
        score(recipe.out, base, world)
        for stage in stages:
            train_stage(stage)
            score(stage.out, EvalConfig(tasks=tuple(tasks)), world)
        read = world.together(lambda: kept_scores(recipe.out) if world.is_main else None)
        core, bits = read[0]["core"], read[0]["bpb"]
        result = {
            "core": core["core"], "interval": core["interval"], "reached": core["core"] > GPT2_CORE,
            "bpb": bits["bpb"], "seconds": last["seconds"], "tokens": last["tokens"],
        }  # fmt: skip
        if world.is_main:
            end = stages[-1].out
            card = ["## Report card", "", *write_report_card(end, f"{end.name}/")]
            write_result(config.out, title, result, [recipe.out], [], more=card)
    return result


def grade_plan(
    config: GradeConfig, recipe: PretrainConfig, stages: list[ChatStage], tasks: list[str], shards: int,
    world: World,
) -> dict[str, str]:  # fmt: skip
    """The lines of the plan. Rank 0 asks the hub for the sizes of what is missing."""
    words = download_words("climbmix", config.data, shards, world)
    if world.is_main:
        words += "".join(f"; {plan_words(p, folder)}" for folder, p in download_plans(stages, tasks).items())
        if config.core_bundle is None and not (cache_folder() / CORE_FOLDER).exists():
            words += f"; CORE's tasks, 0.16 GB, to {cache_folder()}"
    lines = plan(recipe, world, words, later=[later(stage, recipe) for stage in stages])
    lines["scores"] = f"bpb and core of the base; {' '.join(tasks)} after each later stage"
    lines["time"] += "; scoring, sampling of answers, and data whose length is not known come on top"
    return lines


def main(config: GradeConfig) -> int:
    """`hotlap speedrun gpt2-grade`."""
    return talk_to(config.out / config.finish) if grade_speedrun(config) else 0

"""nanochat's speedrun: a base model that beats GPT-2 (1.5B) on CORE, then fine-tuned for chat."""

from __future__ import annotations

import dataclasses
import json
import math

from hotlap.train.data.conversations import (
    check_conversations,
    conversation_plans,
    download_conversations,
)
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.prepare import CLIMBMIX_TOKENS, climbmix_with_tokenizer
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.command import EvalConfig, evaluate_model
from hotlap.train.presets import gpt2_grade, gpt2_grade_sft
from hotlap.train.pretrain import pretrain
from hotlap.train.sft import fine_tune
from hotlap.train.speedruns.config import GradeConfig
from hotlap.train.speedruns.plan import confirm, download_words, plan, plan_words
from hotlap.train.speedruns.result import talk_to, write_result

GPT2_CORE = 0.256525


def grade_speedrun(config: GradeConfig) -> dict:
    """Train, score and fine-tune. Returns the result, or {} if the user declines the plan. All ranks call
    it.
    """
    config.validate()
    recipe = dataclasses.replace(
        gpt2_grade(config.depth), out=config.out / "pretrain", data=str(config.data),
        micro_batch=config.micro_batch, dtype="fp8" if config.fp8 else "auto", resume="auto",
    ).validate()  # fmt: skip
    with joined() as world:
        shards = math.ceil(recipe.tokens / CLIMBMIX_TOKENS)
        parts = parts_of(config.talks)
        check_conversations(parts)
        download = download_words("climbmix", config.data, shards, world)
        if world.is_main:
            download += "".join(f"; {plan_words(p, p.folder)}" for p in conversation_plans(parts))
        title = f"a {config.depth}-layer model with a CORE above {GPT2_CORE}, fine-tuned for chat"
        lines = plan(recipe, world, download)
        lines["length"] += f"; then fine-tuning on {' '.join(config.talks)}, not included in the time below"
        if not confirm(title, lines, config.yes, world):
            return {}
        with world.main_first("climbmix"):
            if world.is_main:
                climbmix_with_tokenizer(config.data, shards, recipe.model.vocab_size)
                download_conversations(parts)
        scores_path = config.out / "scores.json"
        last = pretrain(recipe, warm_up=True)
        if not scores_path.exists():
            tasks = EvalConfig(
                recipe.out, ("bpb", "core"), data=config.data, validation_tokens=recipe.validation_tokens,
                core_bundle=config.core_bundle, out=scores_path,
            )  # fmt: skip
            evaluate_model(tasks)
        read = world.together(lambda: json.loads(scores_path.read_text()) if world.is_main else None)
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
        if world.is_main:
            write_result(config.out, title, result, [recipe.out], [])
    return result


def main(config: GradeConfig) -> int:
    """`hotlap speedrun gpt2-grade`."""
    return talk_to(config.out / "sft") if grade_speedrun(config) else 0

"""The stages of `hotlap speedrun gpt2-grade` that make a chat model of a base model: what each needs before
it starts, what it is scored on, and what the plan says about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.model.sandbox import find_sandbox
from hotlap.model.weights import model_folder
from hotlap.train.config import DPOConfig, PretrainConfig, SFTConfig
from hotlap.train.data import hub
from hotlap.train.data.conversations import (
    check_conversations,
    conversation_plans,
    download_conversations,
)
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.preferences import DOWNLOADED, check_pairs, download_pairs, pair_plans
from hotlap.train.data.prompts import (
    check_prompt_data,
    download_prompts,
    identity_of,
    prompt_plans,
    source_of,
)
from hotlap.train.distributed.world import World
from hotlap.train.dpo import optimize_preferences
from hotlap.train.evaluation import chat_tasks
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import BUILT_IN, HUMANEVAL, PUBLIC, EvalConfig
from hotlap.train.evaluation.core_bundle import core_bundle, read_bundle
from hotlap.train.evaluation.kept_scores import kept_scores
from hotlap.train.presets import gpt2_grade_dpo, gpt2_grade_rl, gpt2_grade_sft
from hotlap.train.rl import reinforce
from hotlap.train.rl_config import RLConfig
from hotlap.train.sft import fine_tune
from hotlap.train.speedruns.config import GradeConfig
from hotlap.train.speedruns.plan import Later
from hotlap.train.stage import check_machine

# For the plan: of the mixture with SmolTalk, and of the two sides of UltraFeedback's 61,135 pairs.
SMOLTALK_TOKENS, ULTRAFEEDBACK_TOKENS = 500e6, 60e6
ChatStage = SFTConfig | DPOConfig | RLConfig


def chat_stages(config: GradeConfig, recipe: PretrainConfig) -> list[ChatStage]:
    """The configurations of the stages after pretraining, in their order."""
    common = {"micro_batch": config.micro_batch, "resume": "auto"}
    sft = gpt2_grade_sft(recipe, config.talks)
    stages = [dataclasses.replace(sft, out=config.out / "sft", **common)]
    if config.finish == "dpo":
        stages.append(gpt2_grade_dpo(stages[0], config.pairs))
    elif config.finish == "rl":
        stages.append(gpt2_grade_rl(stages[0], config.prompts))
    last = dataclasses.replace(stages[-1], out=config.out / config.finish, **common)
    return [stage.validate() for stage in (*stages[:-1], last)]


def check_stage(stage: ChatStage, recipe: PretrainConfig, world: World) -> None:
    """Raise what is wrong with a stage's data, and what this machine cannot do, before a base is trained."""
    if isinstance(stage, SFTConfig):
        check_conversations(parts_of(stage.data))
    elif isinstance(stage, DPOConfig):
        check_pairs(stage.data)
    else:
        for name in stage.data:
            identity_of(name)  # raises if it is nothing at all
            if source_of(name) is None:
                raise ValueError(
                    f"--prompts {name} is a file, which has no reward here; end with --finish sft, and give "
                    "the file to `hotlap rl` with --reward"
                )
        check_prompt_data(stage.data, stage.reward)
    check_machine(stage, world, recipe.model)


def later(stage: ChatStage, recipe: PretrainConfig) -> Later:
    """A stage's line of the plan. Tokens are estimated for the named data sets alone."""
    data, context = " ".join(stage.data), recipe.model.context
    if isinstance(stage, SFTConfig):
        named = any(part.name == "smoltalk" for part in parts_of(stage.data))
        tokens = SMOLTALK_TOKENS if named else stage.loop.steps * stage.batch_rows * context
        return Later("sft", f"{data}, {'about' if named else 'at least'} {tokens / 1e6:,.0f}M tokens", tokens)
    if isinstance(stage, DPOConfig):
        tokens = ULTRAFEEDBACK_TOKENS if DOWNLOADED in stage.data else 0
        words = f", about {tokens / 1e6:,.0f}M tokens" if tokens else ""
        return Later("dpo", data + words, tokens * 4 / 3)  # with the forward pass of the reference
    answers, steps = stage.batch_rows, stage.loop.steps
    tokens = answers * steps * stage.max_tokens
    words = f"{data}, {steps:,} steps of {answers} answers of at most {stage.max_tokens} tokens"
    return Later("rl", f"{words}: {tokens / 1e6:,.0f}M, sampled and trained on", tokens)


def train_stage(stage: ChatStage) -> None:
    """Train a stage, or what is left of it."""
    if isinstance(stage, SFTConfig):
        fine_tune(stage)
    elif isinstance(stage, DPOConfig):
        optimize_preferences(stage)
    else:
        reinforce(stage)


def asked_of(talks: Sequence[str], world: World) -> list[str]:
    """What chat models are scored on: the public tasks, spelling, and other built-in ones that the mixture
    teaches. Without HumanEval, which is logged, unless every rank has a sandbox.
    """
    taught = {part.name for part in parts_of(talks)}
    found = [*PUBLIC, *(task for task in BUILT_IN if task == "spelling" or taught & {task, "tasks"})]
    if not all(world.together(lambda: find_sandbox() is not None)):
        log.info("%s is left out: it runs what the model writes, and no sandbox works here", HUMANEVAL)
        found.remove(HUMANEVAL)
    return found


def score(run: Path, config: EvalConfig, world: World) -> None:
    """Score the newest checkpoint of a run on those of config's tasks of which it has no score yet; all ranks
    call it.
    """

    def missing() -> tuple[str, ...]:
        checkpoint, kept = model_folder(run).name, kept_scores(run)
        return tuple(t for t in config.tasks if kept.get(t, {}).get("checkpoint") != checkpoint)

    tasks = world.together(lambda: missing() if world.is_main else None)[0]
    if tasks:
        evaluate_model(dataclasses.replace(config, model=run, tasks=tasks))
    else:
        log.info("%s is scored already", run)


def check_core(bundle: Path | None) -> None:
    """Read a bundle of CORE's tasks that the user names, so that its errors show before a base is trained."""
    if bundle is not None:
        read_bundle(bundle)


def download(stages: Sequence[ChatStage], tasks: list[str], bundle: Path | None) -> None:
    """Download what the stages train on and what they are scored on, where it is not there yet."""
    for stage in stages:
        if isinstance(stage, SFTConfig):
            download_conversations(parts_of(stage.data))
        elif isinstance(stage, DPOConfig):
            download_pairs(stage.data)
        else:
            download_prompts(stage.data)
    chat_tasks.download(tasks)
    read_bundle(bundle or core_bundle(cache_folder()))


def download_plans(stages: Sequence[ChatStage], tasks: list[str]) -> dict[Path, hub.DownloadPlan]:
    """What `download` will fetch from the hub, by folder. Asks the hub for sizes."""
    plans = chat_tasks.plans(tasks)
    for stage in stages:
        if isinstance(stage, SFTConfig):
            plans += conversation_plans(parts_of(stage.data))
        elif isinstance(stage, DPOConfig):
            plans += pair_plans(stage.data)
        else:
            plans += prompt_plans(stage.data)
    found: dict[Path, hub.DownloadPlan] = {}
    for plan in plans:
        missing = found[plan.folder].missing if plan.folder in found else {}
        found[plan.folder] = dataclasses.replace(plan, missing=missing | plan.missing)
    return {folder: plan for folder, plan in found.items() if plan.missing}

"""Reinforcement learning: a chat model learns from rewards for its own answers."""

from __future__ import annotations

import hashlib
import json
import random
import shlex

import torch

from hotlap.common.log import log
from hotlap.kernels.batch_invariant import batch_invariant, batch_invariant_works
from hotlap.model.config import Shape
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.tools import check_tools, named_tools
from hotlap.model.weights import TOKENIZER, load_model
from hotlap.train.answer_steps import AnswerSteps
from hotlap.train.data.prompts import (
    Prompt,
    check_prompt_data,
    download_prompts,
    prompts_of,
    rewards_of,
    tools_of,
)
from hotlap.train.data.sources import SPLITS
from hotlap.train.distributed.sharding import compute_dtype
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.held_out_answers import HeldOut
from hotlap.train.policy_losses import policy_loss
from hotlap.train.rewards.guarded import Failure, Guarded, Sample
from hotlap.train.rl_config import RLConfig
from hotlap.train.rollouts import Question, Sampler, questions_of
from hotlap.train.sft import check_tokenizer, open_chat_model
from hotlap.train.stage import Stage, check_machine, closing, evaluated_aside, opened, train

WAIT = 1800  # seconds that ranks wait for one whose rewards take long


def reinforce(config: RLConfig) -> dict[str, float]:
    """Train on all ranks, and return the last metrics."""
    config = config.validate()
    check_prompt_data(config.data, config.reward)
    if config.tools:
        check_tools(config.tools)
    rewards = rewards_of(config.data, config.reward)
    with (
        joined(WAIT) as world,
        evaluated_aside(config, world) as config,
        Guarded(rewards.values(), config.reward_seconds) as guarded,
    ):
        base, shape, tokenizer = open_chat_model(config)
        check_machine(config, world, shape)
        with world.main_first("download the questions"):
            if world.is_main:
                download_prompts(config.data)

        def prepare() -> dict[str, list[Question]]:
            """Everything that is read, so that its errors show before anything is sampled."""
            check_tokenizer(config.out / TOKENIZER, tokenizer)
            return {split: questions(config, split, tokenizer, shape) for split in SPLITS}

        with opened(config, world, prepare) as asked:

            def score(answered: list[tuple[Prompt, str]]) -> list[float | Failure]:
                return guarded.score([Sample(rewards[p.source], a, p.record, p.place) for p, a in answered])

            sampler = Sampler(tokenizer, score, config.max_tokens, world)
            dtype, reference = compute_dtype(config.dtype, world, shape.width), None
            if config.kl:
                reference = load_model(config.base, world.device, dtype)[0].for_inference()
            exact = dtype == torch.float32 and batch_invariant_works(world.device, dtype)
            held_out = HeldOut(sampler, asked["validation"], config.samples, config.seed)
            groups = config.batch_rows // config.samples
            steps = AnswerSteps(config, asked["train"], sampler, reference, config.out)
            with batch_invariant(exact):
                return train(
                    config,
                    Stage(
                        "rl", shape, tokenizer, policy_loss(config),
                        batches=steps, one_row=steps.one_row,
                        evaluate=held_out.scores if asked["validation"] else None,
                        data=digest(asked["train"]), source=" ".join(config.data),
                        about=f"{len(asked['train'])} questions, {groups} x {config.samples} answers a step, "
                        f"{config.loop.steps * groups / len(asked['train']):.1f} epochs, "
                        f"{len(asked['validation'])} questions to validate",
                        loop=config.loop, base=base,
                    ),
                    world,
                )  # fmt: skip


def questions(config: RLConfig, split: str, tokenizer: Tokenizer, shape: Shape) -> list[Question]:
    """A split's questions that fit in the context: all to train on, or as many as validate. ValueError if
    none is left to train on.
    """
    prompts = prompts_of(config.data, split, config.seed)
    names = {prompt.source: tools_of(prompt.source, config.tools) for prompt in prompts}
    tools = {source: named_tools(own) if own else {} for source, own in names.items()}
    found, left_out = questions_of(prompts, tools, tokenizer, shape.context)
    if left_out:
        log.warning(
            "%d of %d questions to %s do not fit in the context of %d tokens, and are left out",
            left_out, len(prompts), {"train": "train on", "validation": "validate"}[split], shape.context,
        )  # fmt: skip
    if split == "train" and not found:
        raise ValueError(f"{' '.join(config.data)}: no question is left to train on")
    if split == "validation":
        found = random.Random(0).sample(found, min(config.validation_questions, len(found)))
    return found


def digest(asked: list[Question]) -> str:
    """The fingerprint of questions and what their rewards depend on."""
    records = [(question.prompt.messages, question.prompt.record) for question in asked]
    return hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()


def main(config: RLConfig) -> None:
    """`hotlap rl`."""
    last = reinforce(config)
    print(closing(config, last, f"chat with it: python chat.py {shlex.quote(str(config.out))}"))

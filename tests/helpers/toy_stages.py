"""Two stages that hotlap does not have, as somebody would add them: preferences, and policy gradients."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.run_functions import GENTLE, metrics
from helpers.tools import tiny_config, train_tiny_tokenizer
from torch import Tensor

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.stage import Stage, StageConfig, check_machine, opened, train

SHAPE = tiny_config(vocab_size=300, context=16, layers=2, width=32, heads=1, kv_heads=1)
PROMPT, ANSWER = 4, 6  # tokens


@dataclass(frozen=True)
class ToyConfig(StageConfig):
    out: Path = Path("runs/toy")


@dataclass(frozen=True)
class Rollouts(Batch):
    advantage: Tensor  # (B,)


def row(step: int, place: int) -> Tensor:
    """Random tokens, always the same at a place of a step."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    return torch.randint(2, 300, (PROMPT + ANSWER + 1,), generator=generator)


def rows_of(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets of which the answer's carry loss, and document starts."""
    targets = ids[:, 1:].clone()
    targets[:, : PROMPT - 1] = IGNORE
    return ids[:, :-1], targets, torch.zeros_like(targets)


def log_probabilities(model: GPT, batch: Batch) -> Tensor:
    """Of the answer in each row: (B,)."""
    losses = model(batch.inputs, batch.targets, document_start=batch.document_start, reduction="none")
    return -losses.view_as(batch.targets).sum(1)


def preference_loss(model: GPT, batch: Batch):
    """Rows are pairs, the first of which is preferred; the weight is the number of pairs."""
    better, worse = log_probabilities(model, batch).view(-1, 2).unbind(1)
    margin = better - worse
    return -F.logsigmoid(0.1 * margin).sum(), {"margin": margin.sum(), "right": (margin > 0).sum()}


def policy_loss(model: GPT, batch: Rollouts):
    """REINFORCE; the weight is the number of tokens with an advantage."""
    found = log_probabilities(model, batch)
    return -(batch.advantage * found).sum(), {"advantage": batch.advantage.sum()}


def my_rows(config: StageConfig, world, micro_rows: int) -> list[range]:
    """The places of this rank's micro-batches in a step."""
    starts = range(world.rank * micro_rows, config.batch_rows, micro_rows * world.size)
    return [range(start, start + micro_rows) for start in starts]


def preference(config: ToyConfig) -> dict:
    with joined() as world:
        check_machine(config, world)

        def batches(model, state, micro_rows):
            for step in itertools.count(state.step):
                yield [
                    Batch(*rows_of(torch.stack([row(step, i) for p in pairs for i in (2 * p, 2 * p + 1)])),
                          weight=len(pairs))
                    for pairs in my_rows(config, world, micro_rows)
                ]  # fmt: skip

        stage = Stage(
            "preference", SHAPE, train_tiny_tokenizer(), preference_loss, batches, evaluate=None,
            data="toy", source="pairs", about="pairs", loop=config.loop,
        )  # fmt: skip
        with opened(config, world, lambda: None):
            return train(config, stage, world)


def policy(config: ToyConfig) -> dict:
    with joined() as world:
        check_machine(config, world)

        @torch.no_grad()
        def rollout(model: GPT, ids: Tensor) -> Rollouts:
            """Answers of the model as it is now, and whether it is to give more or fewer of their kind."""
            for _ in range(ANSWER + 1):
                ids = torch.cat((ids, model(ids)[:, -1:, :300].argmax(-1)), dim=1)
            advantage = (ids[:, PROMPT:] % 2 == 0).float().mean(1) - 0.25
            return Rollouts(*rows_of(ids), weight=ids.shape[0] * ANSWER, advantage=advantage)

        def batches(model, state, micro_rows):
            for step in itertools.count(state.step):
                yield [
                    rollout(model, torch.stack([row(step, i)[:PROMPT] for i in rows]))
                    for rows in my_rows(config, world, micro_rows)
                ]

        stage = Stage(
            "policy", SHAPE, train_tiny_tokenizer(), policy_loss, batches,
            evaluate=lambda model, at_once: {"validation_reward": 0.5},
            data="toy", source="prompts", about="prompts", loop=config.loop,
        )  # fmt: skip
        with opened(config, world, lambda: None):
            return train(config, stage, world)


def train_toy(stage: str, folder: str, name: str) -> list[dict]:
    """Five steps of eight rows in micro-batches of two; the lines of metrics.jsonl."""
    config = ToyConfig(
        out=Path(folder) / name, batch_rows=8, micro_batch="2", dtype="float32", compile="off", optim=GENTLE,
        schedule=ScheduleConfig(warmup_steps=2), loop=LoopConfig(5, evaluate_every=5, save_every=3),
    )  # fmt: skip
    {"preference": preference, "policy": policy}[stage](config)
    return metrics(config.out)

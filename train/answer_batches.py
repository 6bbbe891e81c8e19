"""What a step of reinforcement learning trains on: groups of answers, their advantages, and batches of them."""
# B answers, T tokens

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hotlap.common.log import log
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.gpt import GPT
from hotlap.train.config import RLConfig
from hotlap.train.data.rows import check_rows
from hotlap.train.distributed.world import World
from hotlap.train.policy_losses import AnswerBatch, log_probabilities
from hotlap.train.rollout_log import RolloutLog
from hotlap.train.rollouts import Answer, Draw, Question, Sampler, seed_of
from hotlap.train.run.state import RunState

Group = list[Answer]  # the answers to one question
MULTIPLE = 16  # rows are padded to a multiple of this many tokens


@dataclasses.dataclass
class Step:
    """The answers of a step. equal, failed: shares of all groups and answers that were drawn for it."""

    groups: list[Group]
    equal: float
    failed: float

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> Step:
        groups = [[Answer(**answer) for answer in group] for group in saved["groups"]]
        return cls(groups, saved["equal"], saved["failed"])


def teaches(group: Group) -> bool:
    """Whether rewards of the group differ."""
    return len({answer.reward for answer in group if answer.reward is not None}) > 1


def advantages(group: Group) -> list[float]:
    """Each reward minus the mean of the group; 0 where the reward failed."""
    rewards = [answer.reward for answer in group if answer.reward is not None]
    mean = statistics.fmean(rewards) if rewards else 0.0
    return [0.0 if answer.reward is None else answer.reward - mean for answer in group]


class AnswerBatches:
    """Samples the answers of each step, and makes batches of them. All is a function of the config, the step
    and the policy's weights, so a resumed run goes on with the same questions and answers.
    """

    def __init__(
        self, config: RLConfig, questions: list[Question], sampler: Sampler, reference: GPT | None, run: Path
    ):
        self.config, self.questions, self.sampler, self.reference = config, questions, sampler, reference
        self.run, self.world = run, sampler.world
        self.bos = sampler.tokenizer.bos
        self.warned = False

    def __call__(self, model: GPT, state: RunState, micro_rows: int) -> Iterator[list[AnswerBatch]]:
        """This rank's micro-batches of each step to come; collective. With several updates for each set of
        answers, `state.carried` has those that the next step needs again.
        """
        config, world = self.config, self.world
        check_rows(config.batch_rows, micro_rows, world.size)
        shown = RolloutLog(self.run, state.step) if world.is_main else None
        step = Step.from_json(state.carried) if state.carried else None
        for number in itertools.count(state.step):
            update = number % config.updates
            if update == 0 or step is None:
                step = self.sampled(model, number // config.updates)
                if shown:
                    shown.write(number, self.questions, step.groups[0])
            if config.updates > 1 and not step.groups[0][0].old:
                self.remember(model, step, micro_rows)
            state.carried.clear()
            if update + 1 < config.updates:
                state.carried.update(step.to_json())
            yield [self.complete(batch) for batch in self.micro_batches(model, step, micro_rows)]

    def sampled(self, model: GPT, number: int) -> Step:
        """The `number`-th set of answers. Groups whose rewards are all equal teach nothing: other questions
        replace them, as often as `resample` says. ValueError if every reward fails.
        """
        config = self.config
        asked = self.in_order(
            number * config.batch_rows // config.samples, config.batch_rows // config.samples
        )
        groups = self.answered(model, asked, number, 0)
        if all(answer.reward is None for group in groups for answer in group):
            raise ValueError(f"every reward of a step failed: {groups[0][0].problem}")
        drawn = list(groups)
        for attempt in range(1, config.resample + 1):
            dull = [i for i, group in enumerate(groups) if not teaches(group)]
            if not dull:
                break
            generator = random.Random(f"{config.seed} {number} {attempt}")
            asked = [generator.randrange(len(self.questions)) for _ in dull]
            again = self.answered(model, asked, number, attempt)
            drawn += again
            for i, group in zip(dull, again, strict=True):
                groups[i] = group
        if not any(map(teaches, groups)) and not self.warned:
            self.warned = True
            rewards = {answer.reward for group in groups for answer in group}
            log.warning(
                "the answers to each question of a step have the same reward (%s), so it teaches nothing, and "
                "is skipped, as others like it will be (`skipped` in metrics.jsonl counts them); try easier or "
                "harder questions, partial rewards, more --samples, or a higher --resample",
                ", ".join(f"{reward:g}" for reward in rewards if reward is not None),
            )  # fmt: skip
        failed = [answer.reward is None for group in drawn for answer in group]
        return Step(groups, statistics.fmean(not teaches(group) for group in drawn), statistics.fmean(failed))

    def in_order(self, first: int, count: int) -> list[int]:
        """Questions by their place in an endless sequence, in which each epoch has its own order."""
        found = []
        for place in range(first, first + count):
            epoch, i = divmod(place, len(self.questions))
            order = list(range(len(self.questions)))
            random.Random(f"{self.config.seed} {epoch}").shuffle(order)
            found.append(order[i])
        return found

    def answered(self, model: GPT, asked: list[int], number: int, attempt: int) -> list[Group]:
        """The sampled answers to each of the questions."""
        samples = self.config.samples
        draws = [
            Draw(question, seed_of(self.config.seed, number, attempt, i, sample))
            for i, question in enumerate(asked)
            for sample in range(samples)
        ]
        answers = self.sampler(model, self.questions, draws)
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]

    @torch.no_grad()
    def remember(self, model: GPT, step: Step, micro_rows: int) -> None:
        """Give each answer its log-probabilities by a training pass with the weights it was sampled with."""
        rows = []
        for batch in self.micro_batches(model, step, micro_rows):
            batch = batch.to(self.world.device)
            rows += log_probabilities(model, batch).cpu().tolist()
        found: dict[int, list[float]] = {}
        for rank, of_rank in enumerate(self.world.gather(rows)):
            found |= dict(zip(self.rows_of(rank, micro_rows), of_rank, strict=True))
        for i, answer in enumerate(itertools.chain(*step.groups)):
            answer.old = [
                p
                for p, is_sampled in zip(found[i][answer.start - 1 :], answer.sampled, strict=False)
                if is_sampled
            ]

    def rows_of(self, rank: int, micro_rows: int) -> list[int]:
        """Which of a step's answers a rank trains on, micro-batch after micro-batch."""
        starts = range(rank * micro_rows, self.config.batch_rows, micro_rows * self.world.size)
        return [row for start in starts for row in range(start, start + micro_rows)]

    def micro_batches(self, model: GPT, step: Step, micro_rows: int) -> list[AnswerBatch]:
        """This rank's, without `reference`."""
        config = self.config
        answers = list(itertools.chain(*step.groups))
        advantage = [a for group in step.groups for a in advantages(group)]
        counted = [answer for answer in answers if answer.reward is not None]
        token_share = len(answers) / max(1, sum(sum(answer.sampled) for answer in counted))
        T = self.row_tokens(model.config.context)
        mine = self.rows_of(self.world.rank, micro_rows)
        found = []
        for start in range(0, len(mine), micro_rows):
            rows = mine[start : start + micro_rows]
            shape = (micro_rows, T)
            inputs, targets = np.full(shape, self.bos), np.full(shape, IGNORE)
            sampler, old = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            shares, facts = [], []
            for b, row in enumerate(rows):
                answer = answers[row]
                first, end, mask = answer.start - 1, len(answer.ids) - 1, np.array(answer.sampled)
                inputs[b, :end] = answer.ids[:-1]
                if answer.reward is not None:
                    targets[b, first:end][mask] = np.array(answer.ids[answer.start :])[mask]
                    sampler[b, first:end][mask] = np.array(answer.logprobs)[mask]
                    if answer.old:
                        old[b, first:end][mask] = answer.old
                shares.append(share(answer, config, token_share))
                facts.append(
                    ((answer.reward or 0.0) * len(answers) / len(counted), int(mask.sum()), answer.cut_off,
                     answer.calls, step.failed, step.equal)
                )  # fmt: skip
            numbers = [advantage[row] for row in rows], shares, [token_share] * len(rows)
            found.append(
                AnswerBatch(
                    *map(torch.from_numpy, (inputs, targets)), torch.zeros(shape, dtype=torch.int64), micro_rows,
                    *(torch.tensor(values, dtype=torch.float32) for values in numbers),
                    *map(torch.from_numpy, (sampler, old, np.zeros(shape, np.float32))),
                    torch.tensor(facts, dtype=torch.float32), stored=config.updates > 1,
                )
            )  # fmt: skip
        return found

    @torch.no_grad()
    def complete(self, batch: AnswerBatch) -> AnswerBatch:
        """The batch with the base's log-probabilities, where the loss needs them."""
        if self.reference is None:
            return batch
        found = log_probabilities(self.reference, batch.to(self.world.device))
        return dataclasses.replace(batch, reference=found.cpu())

    def row_tokens(self, context: int) -> int:
        """Tokens of a row: of the longest prompt and answer, the same in every step."""
        longest = max(len(question.ids) for question in self.questions) + self.config.max_tokens
        return min(-(-longest // MULTIPLE) * MULTIPLE, context)


def share(answer: Answer, config: RLConfig, token_share: float) -> float:
    """The factor of the loss of each of the answer's tokens: see policy_losses.py."""
    if config.loss == "gspo":
        return 1 / max(1, sum(answer.sampled))
    return 1 / config.max_tokens if config.loss == "dr_grpo" else token_share

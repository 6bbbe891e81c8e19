"""What each step of reinforcement learning trains on: sampled answers, in batches."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from hotlap.common.log import log
from hotlap.model.transformer import Transformer
from hotlap.train.answer_rows import AnswerSet, Group, teaches
from hotlap.train.data.rows import check_rows
from hotlap.train.policy_losses import AnswerBatch, log_probabilities
from hotlap.train.rl_config import RLConfig
from hotlap.train.rollout_log import RolloutLog
from hotlap.train.rollouts import Draw, Question, Sampler, seed_of
from hotlap.train.run.state import RunState

MULTIPLE = 16  # rows are padded to a multiple of this many tokens


class AnswerSteps:
    """Samples the answers of each step, and makes batches of them. All is a function of the config, the step
    and the policy's weights, so a resumed run goes on with the same questions and answers.

    reference: the base, where the loss needs its log-probabilities. run: gets rollouts.jsonl.
    """

    def __init__(
        self,
        config: RLConfig,
        questions: list[Question],
        sampler: Sampler,
        reference: Transformer | None,
        run: Path,
    ):
        self.config, self.questions, self.sampler, self.reference = config, questions, sampler, reference
        self.run, self.world, self.padding = run, sampler.world, sampler.tokenizer.bos
        self.warned = False

    def __call__(self, model: Transformer, state: RunState, micro_rows: int) -> Iterator[list[AnswerBatch]]:
        """This rank's micro-batches of each step to come; collective. With several updates for each set of
        answers, `state.carried` has those that the next step needs again.
        """
        config, world = self.config, self.world
        check_rows(config.batch_rows, micro_rows, world.size)
        shown = RolloutLog(self.run, state.step) if world.is_main else None
        made_by = [
            config.batch_rows, config.samples, config.updates, config.max_tokens, config.resample,
            config.reward, list(config.tools),
        ]  # fmt: skip
        found = None
        if state.carried.get("made_by") == made_by:  # else a resumed run asks and scores anew
            found = AnswerSet.from_json(state.carried)
        for number in itertools.count(state.step):
            drawn, update = divmod(number, config.updates)
            if update == 0 or found is None:
                found = self.sampled(model, drawn)
                if shown:
                    shown.write(number, self.questions, found.groups[0])
                if config.updates > 1:
                    self.remember(model, found, micro_rows)
            state.carried.clear()
            if update + 1 < config.updates:
                state.carried.update(found.to_json(), made_by=made_by)
            yield [self.completed(batch) for batch in self.batches(model, found, micro_rows)]

    def one_row(self, model: Transformer) -> AnswerBatch:
        """A row to measure memory by, once the engine has taken its part."""
        return self.completed(self.batches(model, self.sampled(model, 0), 1)[0])

    def sampled(self, model: Transformer, number: int) -> AnswerSet:
        """The `number`-th set of answers. Groups whose rewards are all equal teach nothing: other questions
        replace them, as often as `resample` says. ValueError if every reward fails.
        """
        config = self.config
        count = config.batch_rows // config.samples
        groups = self.answered(model, self.in_order(number * count, count), number, 0)
        if all(answer.reward is None for group in groups for answer in group):
            raise ValueError(
                f"none of {config.batch_rows} answers got a reward, so there is nothing to learn from; the "
                f"first: {groups[0][0].problem}"
            )
        drawn = list(groups)
        for attempt in range(1, config.resample + 1):
            dull = [i for i, group in enumerate(groups) if not teaches(group)]
            if not dull:
                break
            generator = random.Random(f"{config.seed} {number} {attempt}")
            others = [generator.randrange(len(self.questions)) for _ in dull]
            again = self.answered(model, others, number, attempt)
            drawn += again
            for i, group in zip(dull, again, strict=True):
                groups[i] = group
        if not any(map(teaches, groups)):
            self.warn(groups)
        failed = [answer.reward is None for group in drawn for answer in group]
        equal = [not teaches(group) for group in drawn]
        return AnswerSet(groups, statistics.fmean(equal), statistics.fmean(failed))

    def warn(self, groups: list[Group]) -> None:
        """Warn of a step that teaches nothing, once."""
        if self.warned:
            return
        self.warned = True
        rewards = sorted({a.reward for group in groups for a in group if a.reward is not None})
        log.warning(
            "no question of a step has answers with different rewards (only %s), so there is nothing to "
            "learn from it; it is skipped, as others like it will be (`skipped` in metrics.jsonl counts "
            "them). Try easier or harder questions, partial rewards, more --samples or a higher --resample",
            ", ".join(f"{reward:g}" for reward in rewards),
        )  # fmt: skip

    def in_order(self, first: int, count: int) -> list[int]:
        """Questions by their place in an endless sequence, in which each epoch has its own order."""
        found: list[int] = []
        while len(found) < count:
            epoch, start = divmod(first + len(found), len(self.questions))
            order = list(range(len(self.questions)))
            random.Random(f"{self.config.seed} {epoch}").shuffle(order)
            found += order[start : start + count - len(found)]
        return found

    def answered(self, model: Transformer, asked: list[int], number: int, attempt: int) -> list[Group]:
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
    def remember(self, model: Transformer, found: AnswerSet, micro_rows: int) -> None:
        """Give each answer its log-probabilities by a training pass with the weights it was sampled with."""
        rows = []
        for batch in self.batches(model, found, micro_rows):
            rows += log_probabilities(model, batch.to(self.world.device)).cpu()
        numbers = self.numbers(self.world.rank, micro_rows)
        mine = {n: row[found.answers[n].places].tolist() for n, row in zip(numbers, rows, strict=True)}
        for part in self.world.gather(mine):
            for number, logprobs in part.items():
                found.answers[number].old = logprobs

    def numbers(self, rank: int, micro_rows: int) -> list[int]:
        """Which of a step's answers a rank trains on, micro-batch after micro-batch."""
        starts = range(rank * micro_rows, self.config.batch_rows, micro_rows * self.world.size)
        return [number for start in starts for number in range(start, start + micro_rows)]

    def batches(self, model: Transformer, found: AnswerSet, micro_rows: int) -> list[AnswerBatch]:
        """This rank's, without `reference`. On a GPU, rows are as long in every step, so that its passes are
        captured once.
        """
        longest = max(len(answer.ids) for answer in found.answers) - 1
        if self.world.device.type == "cuda":
            longest = max(len(question.ids) for question in self.questions) + self.config.max_tokens
        T = min(-(-longest // MULTIPLE) * MULTIPLE, model.config.context)
        mine = self.numbers(self.world.rank, micro_rows)
        return [
            found.rows(mine[start : start + micro_rows], T, self.padding, self.config)
            for start in range(0, len(mine), micro_rows)
        ]

    @torch.no_grad()
    def completed(self, batch: AnswerBatch) -> AnswerBatch:
        """The batch with the base's log-probabilities, where the loss needs them."""
        if self.reference is None:
            return batch
        reference = log_probabilities(self.reference, batch.to(self.world.device)).cpu()
        return dataclasses.replace(batch, reference=reference)

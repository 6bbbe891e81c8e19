"""Groups of answers, their advantages, and rows of them."""
# B answers, T tokens

from __future__ import annotations

import dataclasses
import itertools
import statistics
from dataclasses import dataclass

import numpy as np
import torch

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.train.policy_losses import AnswerBatch
from hotlap.train.rl_config import RLConfig
from hotlap.train.rollouts import Answer

Group = list[Answer]  # the answers to one question


def teaches(group: Group) -> bool:
    """Whether rewards of the group differ."""
    return len({answer.reward for answer in group if answer.reward is not None}) > 1


def advantages(group: Group) -> list[float]:
    """Each reward minus the mean of the group; 0 where the reward failed."""
    rewards = [answer.reward for answer in group if answer.reward is not None]
    mean = statistics.fmean(rewards) if rewards else 0.0
    return [0.0 if answer.reward is None else answer.reward - mean for answer in group]


@dataclass
class AnswerSet:
    """The answers of a step, the same on all ranks. equal, failed: of all that were drawn for it, the shares
    of the groups with equal rewards, and of the answers whose reward failed.
    """

    groups: list[Group]
    equal: float
    failed: float

    def __post_init__(self) -> None:
        self.answers = list(itertools.chain(*self.groups))
        self.advantages = [a for group in self.groups for a in advantages(group)]
        counted = [answer for answer in self.answers if answer.reward is not None]
        self.token_share = len(self.answers) / max(1, sum(sum(answer.sampled) for answer in counted))
        self.counted_share = len(self.answers) / max(1, len(counted))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> AnswerSet:
        groups = [[Answer(**answer) for answer in group] for group in saved["groups"]]
        return cls(groups, saved["equal"], saved["failed"])

    def rows(self, numbers: list[int], T: int, padding: int, config: RLConfig) -> AnswerBatch:
        """A batch of the answers with these numbers, without `reference`. padding: id after an answer."""
        answers = [self.answers[number] for number in numbers]
        shape = len(answers), T
        inputs, targets = np.full(shape, padding), np.full(shape, IGNORE)
        sampler, old = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for b, answer in enumerate(answers):
            end = len(answer.ids) - 1
            inputs[b, :end] = answer.ids[:-1]
            if answer.reward is None:
                continue
            places = answer.places
            targets[b, places] = np.array(answer.ids)[places + 1]
            sampler[b, places] = np.array(answer.logprobs)[answer.sampled]
            if answer.old:
                old[b, places] = answer.old
        per_answer = (
            [self.advantages[number] for number in numbers],
            [self.share(answer, config) for answer in answers],
            [self.token_share] * len(answers),
        )
        return AnswerBatch(
            *map(torch.from_numpy, (inputs, targets)), torch.zeros(shape, dtype=torch.int64),
            len(answers), *(torch.tensor(values, dtype=torch.float32) for values in per_answer),
            *map(torch.from_numpy, (sampler, old, np.zeros(shape, np.float32))),
            torch.tensor([self.facts(answer) for answer in answers], dtype=torch.float32),
            stored=config.updates > 1,
        )  # fmt: skip

    def share(self, answer: Answer, config: RLConfig) -> float:
        """The factor of the loss of each of the answer's tokens: see policy_losses.py."""
        if config.loss == "gspo":
            return 1 / max(1, sum(answer.sampled))
        return 1 / config.max_tokens if config.loss == "dr_grpo" else self.token_share

    def facts(self, answer: Answer) -> tuple[float, ...]:
        """FACTS of an answer: the mean over all of them is that of the rewards that did not fail."""
        reward = 0.0 if answer.reward is None else answer.reward * self.counted_share
        tokens = sum(answer.sampled)
        return reward, tokens, answer.cut_off, answer.calls, self.failed, self.equal

"""Rewards of a policy's answers to held-out questions, and in how many of k answers one is right."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from hotlap.train.evaluation.pass_at_k import mean_pass_at_k
from hotlap.train.rollouts import Draw, Question, Sampler, seed_of

if TYPE_CHECKING:
    from hotlap.model.transformer import Transformer

RIGHT = 1.0  # the reward from which on an answer counts as right


class HeldOut:
    """Samples the same number of answers to each of the questions, with the same random numbers each time."""

    def __init__(self, sampler: Sampler, questions: list[Question], samples: int, seed: int):
        self.sampler, self.questions, self.samples = sampler, questions, samples
        self.draws = [
            Draw(question, seed_of(seed, "validation", question, sample))
            for question in range(len(questions))
            for sample in range(samples)
        ]

    def scores(self, model: Transformer, at_once: int = 0) -> dict[str, float]:
        """The mean reward, pass@1 and pass@`samples` with 95 % intervals; collective. An answer whose reward
        failed is not right.
        """
        answers = self.sampler(model, self.questions, self.draws)
        rewards = [answer.reward or 0.0 for answer in answers]
        right = [
            sum(reward >= RIGHT for reward in rewards[i : i + self.samples])
            for i in range(0, len(rewards), self.samples)
        ]
        scores = {"validation_reward": statistics.fmean(rewards)}
        for k in (1, self.samples):
            found, name = mean_pass_at_k(right, self.samples, k), f"validation_pass_at_{k}"
            low, high = found["interval"]
            scores |= {name: found["accuracy"], f"{name}_low": low, f"{name}_high": high}
        return scores

"""Answers of the policy: sampled by the engine on all ranks, and scored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from hotlap.common.errors import DataError
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import CHUNK, Engine
from hotlap.model.kv_cache import fitting_slots
from hotlap.model.request import Request
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.tools import Tools
from hotlap.model.transformer import Transformer
from hotlap.train.distributed.world import World
from hotlap.train.rewards.guarded import Failure

if TYPE_CHECKING:
    from hotlap.train.data.prompts import Prompt

MOST_AT_ONCE = 256  # answers that a rank's engine samples at once


class Question(NamedTuple):
    """A prompt as tokens. tools: that the answers may call."""

    prompt: Prompt
    ids: list[int]
    tools: Tools


class Draw(NamedTuple):
    """One answer to sample: to which question, and with which random numbers."""

    question: int
    seed: int


@dataclass
class Answer:
    """A sampled and scored answer, as all ranks know it. A checkpoint may keep it as JSON."""

    question: int
    ids: list[int]  # prompt and answer
    sampled: list[bool]  # of each token of the answer: the others are what tools said
    logprobs: list[float]  # of the same, by the engine
    text: str
    calls: int
    cut_off: bool
    reward: float | None  # None: the reward failed
    problem: str = ""  # why
    old: list[float] = field(default_factory=list)  # of the sampled tokens, by a training pass

    @property
    def places(self) -> np.ndarray:
        """Where in a row the sampled tokens are targets: each is predicted from the token before it."""
        return np.flatnonzero(self.sampled) + len(self.ids) - len(self.sampled) - 1


Scorer = Callable[[list[tuple["Prompt", str]]], list["float | Failure"]]  # rewards of answers to prompts


class Sampler:
    """Samples answers to questions on all ranks, with a model whose weights change between calls."""

    def __init__(self, tokenizer: Tokenizer, score: Scorer, max_tokens: int, world: World):
        self.tokenizer, self.score, self.max_tokens, self.world = tokenizer, score, max_tokens, world
        self.engine: Engine | None = None

    def __call__(self, model: Transformer, questions: list[Question], draws: list[Draw]) -> list[Answer]:
        """An answer for each draw of the questions, the same on all ranks; collective. They do not depend on
        how many ranks share the work, but for rounding.
        """
        part = -(-len(draws) // self.world.size)
        mine = draws[self.world.rank * part :][:part]
        asked = [questions[draw.question] for draw in mine]
        requests = self._generate(model, asked, [draw.seed for draw in mine], part)
        found = self.world.together(lambda: self._scored(mine, asked, requests))
        return [answer for answers in found for answer in answers]

    def _generate(
        self, model: Transformer, asked: list[Question], seeds: list[int], most: int
    ) -> list[Request]:
        if self.engine is None:
            device = model.embedding.weight.device
            slots = fitting_slots(model.config, CHUNK, model.compute_dtype, device, min(most, MOST_AT_ONCE))
            self.engine = Engine(model, self.tokenizer, min(self.world.gather(slots)))
        engine = self.engine
        engine.forget()
        requests = []
        for question, seed in zip(asked, seeds, strict=True):
            sampling = Sampling(temperature=1.0, top_k=0, max_tokens=self.max_tokens, seed=seed)
            requests.append(engine.add(question.ids, sampling, question.tools, logprobs=0))
        # what is compiled has no variant for decoding: training's blocks run eagerly here
        with torch.compiler.set_stance("force_eager"):
            while self.world.total(engine.busy)[0]:
                engine.step()
        return requests

    def _scored(self, draws: list[Draw], asked: list[Question], requests: list[Request]) -> list[Answer]:
        texts = [spoken(request.answer, self.tokenizer) for request in requests]
        rewards = self.score([(question.prompt, text) for question, text in zip(asked, texts, strict=True)])
        call = self.tokenizer.special["<|tool_end|>"]
        answers = []
        for draw, request, text, reward in zip(draws, requests, texts, rewards, strict=True):
            tokens = request.tokens
            failed = isinstance(reward, Failure)
            answers.append(
                Answer(
                    draw.question, request.prompt + [token.id for token in tokens],
                    [token.sampled for token in tokens], [token.logprob for token in tokens], text,
                    calls=sum(token.id == call for token in tokens) if request.tools else 0,
                    cut_off=request.finish_reason == "length",
                    reward=None if failed else reward, problem=reward.reason if failed else "",
                )
            )  # fmt: skip
        return answers


def seed_of(*names: object) -> int:
    """A seed that these names determine."""
    return random.Random(" ".join(map(str, names))).getrandbits(62)


def questions_of(
    prompts: list[Prompt], tools: dict[str, Tools], tokenizer: Tokenizer, context: int
) -> tuple[list[Question], int]:
    """Prompts as tokens, but for those that leave no room in the context for a token of answer, and how many
    those are. tools: by the prompts' source. DataError names a prompt that the tokenizer cannot spell.
    """
    found = []
    for prompt in prompts:
        try:
            found.append(Question(prompt, render_prompt(prompt.messages, tokenizer), tools[prompt.source]))
        except DataError as error:
            raise DataError(f"{prompt.place}: {error}") from None
    fitting = [question for question in found if len(question.ids) < context]
    return fitting, len(found) - len(fitting)

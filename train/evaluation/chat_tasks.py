"""What chat models are asked: the questions of each task, how they are answered, and what counts as right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model import sandbox
from hotlap.model.conversation import spoken
from hotlap.model.engine import Engine
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.tools import usable_cores
from hotlap.train.data import hub
from hotlap.train.data.datasets import ARC_CHALLENGE, ARC_EASY, GSM8K, MMLU, Dataset
from hotlap.train.data.tasks import gsm8k, humaneval, multiple_choice
from hotlap.train.distributed.world import World
from hotlap.train.evaluation import questions
from hotlap.train.evaluation.batching import failing_as, progress, shared
from hotlap.train.evaluation.choices import letter_ids, likeliest_letters
from hotlap.train.evaluation.config import HUMANEVAL
from hotlap.train.evaluation.intervals import counted
from hotlap.train.evaluation.questions import same_words
from hotlap.train.rewards.unit_tests import run_tests

SUBSET_SEED = 0  # which examples are asked if not all are
SOLUTION_TOKENS = 256  # of an answer to a word problem, with the calls of the calculator
CODE_TOKENS = 512  # of an answer to a problem of HumanEval


class Question(NamedTuple):
    """text: what the user says. letters: those that the answer is one of; empty if the model writes it.
    problem: whose tests the answer must pass.
    """

    text: str
    answer: str
    letters: str = ""
    problem: humaneval.Problem | None = None


class PublicTask(NamedTuple):
    """read: the questions in a file of the dataset's test split. max_tokens: of an answer."""

    dataset: Dataset
    read: Callable[[Path], Iterator[Question]]
    is_right: Callable[[str, str], bool] = same_words
    max_tokens: int | None = None


@dataclass(frozen=True)
class Asked:
    """The questions of a task that fit in the model's context, as it reads them.

    left_out: how many do not fit.
    """

    task: str
    questions: list[Question]
    prompts: list[list[int]]
    left_out: int


def choices_in(path: Path) -> Iterator[Question]:
    for _, found in multiple_choice.questions_of(path):
        letters = multiple_choice.LETTERS[: len(found.choices)]
        yield Question(multiple_choice.render(found), found.letter, letters)


def problems_in(path: Path) -> Iterator[Question]:
    for _, problem, solution in gsm8k.problems_of(path):
        yield Question(problem, gsm8k.answer_of(solution))


def is_solved(answer: str, expected: str) -> bool:
    return gsm8k.is_right(gsm8k.answer_of(answer), expected)


PUBLIC = {
    "arc-easy": PublicTask(ARC_EASY, choices_in),
    "arc-challenge": PublicTask(ARC_CHALLENGE, choices_in),
    "mmlu": PublicTask(MMLU, choices_in),
    "gsm8k": PublicTask(GSM8K, problems_in, is_solved, SOLUTION_TOKENS),
}


def download(tasks: list[str]) -> None:
    """Download the test splits of the public ones of these tasks to the cache, and check them."""
    for task in tasks:
        if task == HUMANEVAL:
            humaneval.download_problems()
        elif task in PUBLIC:
            dataset = PUBLIC[task].dataset
            hub.download(dataset, dataset.folder, list(dataset.files["test"]))


def plans(tasks: list[str]) -> list[hub.DownloadPlan]:
    """What `download` will download."""
    datasets = [PUBLIC[task].dataset for task in tasks if task in PUBLIC]
    found = [hub.plan_download(d, d.folder, d.files["test"]) for d in datasets]
    return [*found, humaneval.problems_plan()] if HUMANEVAL in tasks else found


def questions_of(task: str) -> list[Question]:
    """All questions of a task. A public one must have been downloaded."""
    if task == HUMANEVAL:
        return [Question(p.prompt, p.prompt + p.solution, problem=p) for p in humaneval.problems()]
    if task not in PUBLIC:
        return [Question(text, answer) for text, answer in questions.TASKS[task]()]
    public = PUBLIC[task]
    paths = [public.dataset.folder / name for name in public.dataset.files["test"]]
    return [found for path in paths for found in public.read(path)]


def ask(task: str, tokenizer: Tokenizer, context: int, limit: int = 0) -> Asked:
    """A task's questions for a model, at most `limit` of them (0: all), drawn alike for every model.

    A question that leaves no room in the context for a token of answer is left out, and counted. DataError or
    ValueError if the model cannot read a question, or if none is left.
    """
    found = questions_of(task)
    if limit and limit < len(found):
        picked = random.Random(SUBSET_SEED).sample(range(len(found)), limit)
        found = [found[i] for i in sorted(picked)]
    try:
        prompts = [questions.question(item.text, tokenizer) for item in found]
        letter_ids(max((item.letters for item in found), key=len, default=""), tokenizer)
    except DataError as error:
        raise DataError(
            f"the model cannot read the questions of {task}: {error}; try other --tasks"
        ) from error
    fitting = [pair for pair in zip(found, prompts, strict=True) if len(pair[1]) < context]
    if not fitting:
        raise ValueError(
            f"{task} has no question that fits in the model's context of {context} tokens, of "
            f"{len(found)}; leave it out of --tasks"
        )
    if left_out := len(found) - len(fitting):
        log.warning(
            "warning: %s: %d of %d questions do not fit in the context of %d tokens, and are left out",
            task, left_out, len(found), context,
        )  # fmt: skip
    return Asked(task, *map(list, zip(*fitting, strict=True)), left_out)


def examine(engine: Engine, asked: Asked, world: World) -> tuple[dict, list[tuple[str, str, str]]]:
    """The accuracy on a task with its interval and n, and (question, expected, answer) of each wrong answer;
    collective. FloatingPointError names the task if a logit is not finite.
    """
    pairs = list(zip(asked.questions, asked.prompts, strict=True))
    with failing_as(asked.task):
        answers = shared(world, pairs, partial(answers_to, engine, asked.task, world))
    answered = list(zip(asked.questions, answers, strict=True))
    right = shared(world, answered, partial(are_right, asked.task, world))
    wrong = [
        (item.text, item.answer, answer)
        for (item, answer), passes in zip(answered, right, strict=True)
        if not passes
    ]
    score = counted(len(answers) - len(wrong), len(answers))
    log.info("%s: %.1f %% of %d correct", asked.task, 100 * score["accuracy"], score["n"])
    return score | ({"left_out": asked.left_out} if asked.left_out else {}), wrong


def answers_to(engine: Engine, task: str, world: World, pairs: list[tuple[Question, list[int]]]) -> list[str]:
    """The answers to questions with these prompts: letters, or what the model writes, with the calculator."""
    letters, prompts = [item.letters for item, _ in pairs], [prompt for _, prompt in pairs]
    with progress(world, task, len(pairs)) as bar:
        if any(letters):
            return likeliest_letters(engine.model, engine.tokenizer, prompts, letters, bar)
        max_tokens = CODE_TOKENS if task == HUMANEVAL else None
        max_tokens = PUBLIC[task].max_tokens if task in PUBLIC else max_tokens
        ids = questions.greedy(engine, prompts, max_tokens, bar)
        return [spoken(answer, engine.tokenizer) for answer in ids]


def are_right(task: str, world: World, answered: list[tuple[Question, str]]) -> list[bool]:
    """Whether each question of a task has a right answer. Of code, as many as there are cores are tested at
    once.
    """
    if task != HUMANEVAL:
        is_right = PUBLIC[task].is_right if task in PUBLIC else same_words
        return [is_right(answer, item.answer) for item, answer in answered]
    isolated = sandbox.require_sandbox(HUMANEVAL)

    def passes(pair: tuple[Question, str]) -> bool:
        item, answer = pair
        return run_tests(isolated, item.problem.program(answer), item.problem.tests)

    at_once = max(1, usable_cores() // world.size)
    with progress(world, f"{task}'s tests", len(answered)) as bar, ThreadPoolExecutor(at_once) as pool:
        found = []
        for right in pool.map(passes, answered):
            found.append(right)
            bar.update()
    return found

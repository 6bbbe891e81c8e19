"""Accuracy on held-out questions of the built-in tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.kernels.dispatch import default_device
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import load_model
from hotlap.train.data.sources import split_documents
from hotlap.train.data.tasks import arithmetic, facts, refusals, spelling
from hotlap.train.evaluation.intervals import counted

ANSWER_TOKENS = 96
SUMS, SPELLINGS = 200, 100  # held-out questions
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What does len do?",
    "What is 123 + 456?",
    "How do you spell python?",
    "Who wrote Hamlet?",
)


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations. Raises FloatingPointError if a logit is not finite."""
    return engine.complete(prompts, Sampling(temperature=0, max_tokens=ANSWER_TOKENS))


def question(text: str, tokenizer: Tokenizer) -> list[int]:
    return render_prompt([{"role": "user", "content": text}], tokenizer)


def wrong_answers(engine: Engine, examples: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(question, expected, answer) of each greedy answer that differs in more than whitespace."""
    tokenizer = engine.tokenizer
    answers = greedy(engine, [question(text, tokenizer) for text, _ in examples])
    return [
        (text, expected, answer)
        for (text, expected), answer in zip(examples, (spoken(a, tokenizer) for a in answers), strict=True)
        if " ".join(answer.split()) != " ".join(expected.split())
    ]


TASKS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "facts": facts.held_out,
    "arithmetic": lambda: arithmetic.held_out(SUMS),
    "spelling": lambda: spelling.held_out(spelling.words(split_documents("pydocs")[0]), SPELLINGS),
    "refusals": refusals.held_out,
}


def examples_of(task: str, tokenizer: Tokenizer, context: int) -> list[tuple[str, str]]:
    """Questions and answers of a built-in task. DataError or ValueError if the model cannot read them."""
    examples = TASKS[task]()
    try:
        longest = max(len(question(text, tokenizer)) for text, _ in examples)
    except DataError as error:
        raise DataError(
            f"the model cannot read the questions of {task}: {error}; try other --tasks"
        ) from error
    if longest >= context:
        raise ValueError(
            f"the questions of {task} have up to {longest} tokens, and must be shorter than the model's "
            f"context of {context}; try other --tasks"
        )
    return examples


def examine(
    engine: Engine, task: str, examples: list[tuple[str, str]]
) -> tuple[dict, list[tuple[str, str, str]]]:
    """Accuracy on a built-in task's examples with its interval and n, and the wrong answers."""
    wrong = wrong_answers(engine, examples)
    score = counted(len(examples) - len(wrong), len(examples))
    log.info("%s: %.1f %% of %d correct", task, 100 * score["accuracy"], len(examples))
    return score, wrong


def load_engine(path: Path, device: torch.device | None = None) -> Engine:
    device = device or default_device()
    model, tokenizer = load_model(path, device)
    return Engine(model.for_inference(), tokenizer)

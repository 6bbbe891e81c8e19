"""Questions that a chat model answers freely, and the built-in ones that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from hotlap.kernels.dispatch import default_device
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import load_model
from hotlap.train.data.sources import split_documents
from hotlap.train.data.tasks import arithmetic, facts, refusals, spelling

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


def greedy(
    engine: Engine, prompts: list[list[int]], max_tokens: int | None = None, bar: tqdm | None = None
) -> list[list[int]]:
    """Greedy answers, of at most ANSWER_TOKENS if nothing is said. FloatingPointError if a logit is not
    finite.
    """
    sampling = Sampling(temperature=0, max_tokens=max_tokens or ANSWER_TOKENS)
    requests = [engine.add(prompt, sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
        if bar is not None:
            bar.update(sum(request.finish_reason is not None for request in requests) - bar.n)
    return [request.answer for request in requests]


def question(text: str, tokenizer: Tokenizer) -> list[int]:
    return render_prompt([{"role": "user", "content": text}], tokenizer)


def same_words(answer: str, expected: str) -> bool:
    """Whether two texts differ in whitespace alone."""
    return answer.split() == expected.split()


def wrong_answers(engine: Engine, examples: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(question, expected, answer) of each greedy answer that differs in more than whitespace."""
    tokenizer = engine.tokenizer
    answers = greedy(engine, [question(text, tokenizer) for text, _ in examples])
    return [
        (text, expected, answer)
        for (text, expected), answer in zip(examples, (spoken(a, tokenizer) for a in answers), strict=True)
        if not same_words(answer, expected)
    ]


TASKS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "facts": facts.held_out,
    "arithmetic": lambda: arithmetic.held_out(SUMS),
    "spelling": lambda: spelling.held_out(spelling.words(split_documents("pydocs")[0]), SPELLINGS),
    "refusals": refusals.held_out,
}


def load_engine(path: Path, device: torch.device | None = None) -> Engine:
    device = device or default_device()
    model, tokenizer = load_model(path, device)
    return Engine(model.for_inference(), tokenizer)

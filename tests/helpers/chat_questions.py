"""Small public tasks in their real formats, and what several ranks make of them."""

from __future__ import annotations

import torch
from helpers.tools import tiny_config, train_tiny_tokenizer

from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.train.data.datasets import ARC_CHALLENGE, ARC_EASY, GSM8K, MMLU, Dataset
from hotlap.train.distributed.world import World
from hotlap.train.evaluation import questions
from hotlap.train.evaluation.chat_tasks import PUBLIC, ask, examine

WORDS = ("dog", "lazy fox", "cat", "a gâteau", "jump", "mind")


def arc(number: int, letters: str = "ABCD") -> dict:
    """A row of ARC; its right choice has the label letters[number % len(letters)]."""
    text = [WORDS[(number + i) % len(WORDS)] for i in range(len(letters))]
    return {
        "id": f"q{number}", "question": f"What is {number}? " + "Why? " * (number % 5),
        "choices": {"text": text, "label": list(letters)}, "answerKey": letters[number % len(letters)],
    }  # fmt: skip


def mmlu(number: int) -> dict:
    return {
        "question": f"Which of these is {number}?", "subject": "dogs", "choices": list(WORDS[:4]),
        "answer": number % 4,
    }  # fmt: skip


def problem(a: int, b: int) -> dict:
    """A row of GSM8K."""
    solution = f"There are {a} x {b} = <<{a}*{b}={a * b}>>{a * b} dogs.\n#### {a * b}"
    return {"question": f"{a} times {b} dogs?", "answer": solution}


def small_tasks() -> list[tuple[Dataset, list[dict]]]:
    """ARC with 9 and 8 questions, some with three or five choices or numbers for labels, MMLU with 7, and
    GSM8K with 5.
    """
    easy = [arc(i, "12345" if i == 3 else "ABC" if i == 4 else "ABCD") for i in range(9)]
    return [
        (ARC_EASY, easy),
        (ARC_CHALLENGE, [arc(i, "ABCDE") for i in range(8)]),
        (MMLU, [mmlu(i) for i in range(7)]),
        (GSM8K, [problem(i + 2, 12) for i in range(5)]),
    ]


def write_test_split(dataset: Dataset, rows: list[dict]) -> None:
    """A dataset's test split, where a download puts it."""
    import pyarrow
    from pyarrow import parquet

    path = dataset.folder / dataset.files["test"][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def random_engine(context: int = 256) -> Engine:
    """An engine whose model answers at random, the same in every process."""
    model = GPT(tiny_config(context=context)).init_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.7, generator=generator)
    return Engine(model.for_inference(), train_tiny_tokenizer())


def examined(world: World, tasks: tuple[str, ...]) -> dict:
    """Scores and wrong answers of these tasks, whose data are there. `facts` has three questions. Changes
    what the process holds of the tasks.
    """
    questions.TASKS["facts"] = lambda: [(f"What is {word}?", word) for word in WORDS[:3]]
    questions.ANSWER_TOKENS = 6
    PUBLIC["gsm8k"] = PUBLIC["gsm8k"]._replace(max_tokens=6)
    engine = random_engine()
    return {task: examine(engine, ask(task, engine.tokenizer, 256), world) for task in tasks}

"""What a model is worth: loss and bits per byte on held-out text, and the share of questions answered
right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import load_model
from hotlap.train.data import PackedRows, validation_batches
from hotlap.train.dist import World
from hotlap.train.log import log
from hotlap.train.sources import split_documents
from hotlap.train.tasks import arithmetic, facts, spelling

ANSWER_TOKENS = 96
SUMS, SPELLINGS = 200, 100  # held-out questions


@dataclass(frozen=True)
class EvalConfig:
    """Ask a model the held-out questions of the built-in tasks."""

    model: Path = Path("runs/tiny/sft")
    """Run or model directory."""
    tasks: tuple[str, ...] = ("facts", "arithmetic", "spelling")
    """Which of facts, arithmetic and spelling."""
    out: Path | None = None
    """A JSON file for the scores and every wrong answer; it must not exist yet."""


@torch.no_grad()
def validation(
    model: GPT, rows: PackedRows, tokenizer: Tokenizer, batch_rows: int, limit: int, world: World
) -> dict[str, float]:
    """validation_loss: mean nats a token. validation_bpb: bits for each byte of text, special tokens apart.

    Over all rows, or the first `limit`, each rank taking its part; every rank has to ask.
    """
    device = world.device
    sizes = torch.zeros(model.config.vocab_size, device=device)
    sizes[: tokenizer.vocab_size] = torch.tensor(tokenizer.byte_counts(), dtype=torch.float32)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, tokens, nats of text, bytes of text
    for batch in validation_batches(rows, batch_rows, limit or None, world.rank, world.size):
        batch = batch.to(device)
        losses = model(
            batch.inputs, batch.targets, reduction="none", document_start=batch.document_start
        ).double()
        targets = batch.targets.flatten()
        carries = targets != IGNORE
        size = sizes[targets.clamp(min=0)] * carries
        sums += torch.stack((losses.sum(), carries.sum(), (losses * (size > 0)).sum(), size.sum()))
    nats, count, text_nats, text_bytes = world.total(*sums.tolist())
    if not math.isfinite(nats):
        raise FloatingPointError("the validation loss is not finite; the model's weights are spoilt")
    return {"validation_loss": nats / count, "validation_bpb": text_nats / text_bytes / math.log(2)}


def share_right(engine: Engine, examples: list[tuple[str, str]]) -> tuple[float, list[tuple[str, str, str]]]:
    """Share of questions whose greedy answer is the expected one, and (question, expected, answer) of the
    others.
    """
    prompts = [
        render_prompt([{"role": "user", "content": question}], engine.tokenizer) for question, _ in examples
    ]
    longest = torch.tensor([max(prompts, key=len)], device=engine.device)
    with torch.inference_mode():
        if not engine.model(longest).isfinite().all():
            raise FloatingPointError("the model's logits are not finite; its weights are spoilt")
    sampling = Sampling(temperature=0, max_tokens=ANSWER_TOKENS)
    answers = [engine.spoken(ids) for ids in engine.complete(prompts, sampling)]
    wrong = [
        (question, expected, answer)
        for (question, expected), answer in zip(examples, answers, strict=True)
        if " ".join(answer.split()) != " ".join(expected.split())
    ]
    return 1 - len(wrong) / len(examples), wrong


TASKS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "facts": facts.held_out,
    "arithmetic": lambda: arithmetic.held_out(SUMS),
    "spelling": lambda: spelling.held_out(spelling.words(split_documents("pydocs")[0]), SPELLINGS),
}


def evaluate_tasks(
    engine: Engine, tasks: tuple[str, ...] = tuple(TASKS)
) -> tuple[dict[str, float], dict[str, list]]:
    """Share of held-out questions answered right for each task, and what was answered wrong."""
    scores, wrong = {}, {}
    for task in tasks:
        examples = TASKS[task]()
        scores[task], wrong[task] = share_right(engine, examples)
        log.info("%s: %.1f %% of %d right", task, 100 * scores[task], len(examples))
    return scores, wrong


def load_engine(path: Path) -> Engine:
    device = default_device()
    return Engine(*load_model(path, device, fast_dtype(device.type)))


def evaluate_model(config: EvalConfig) -> dict[str, float]:
    """Run the tasks that config names, and return their scores."""
    if unknown := sorted(set(config.tasks) - set(TASKS)):
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if config.out and config.out.exists():
        raise FileExistsError(f"{config.out} exists; name another file by --out")
    if config.out and not config.out.parent.is_dir():
        raise FileNotFoundError(f"no folder {config.out.parent} for {config.out.name}; make it first")
    scores, wrong = evaluate_tasks(load_engine(config.model), config.tasks)
    if config.out:
        config.out.write_text(json.dumps({"scores": scores, "wrong": wrong}, indent=1) + "\n")
    return scores

"""lm-eval's own tasks are thousands; here are those of a folder, and what a model says to them."""

from __future__ import annotations

from pathlib import Path

import torch

from hotlap.model.engine import Engine
from hotlap.train.evaluation.config import LmEvalConfig


@torch.no_grad()
def log_likelihood(engine: Engine, ids: list[int], given: int) -> tuple[float, bool]:
    """Of the ids after the first `given`, in nats, and whether each is the likeliest."""
    logits = engine.model(torch.tensor([ids]))[0, given - 1 : -1, : engine.tokenizer.vocab_size]
    logprobs = logits.log_softmax(-1)
    targets = torch.tensor(ids[given:])
    total = logprobs.gather(1, targets[:, None]).sum()
    return float(total), bool((logprobs.argmax(-1) == targets).all())


def evaluated(model: Path, *tasks: str, chat: bool = False, limit: int = 0) -> dict:
    """The result of `hotlap lm-eval` on tasks of the working directory."""
    from lm_eval import evaluator

    from hotlap.train.evaluation import lm_eval_command

    evaluator.add_env_info = lambda results: None  # runs pip, which takes a second
    return lm_eval_command.evaluate_model(LmEvalConfig(model, tasks, Path("."), chat, limit=limit))

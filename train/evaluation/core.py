"""CORE, the metric of DCLM (arXiv:2406.11794): 22 in-context learning tasks for base models.

Prompts, few-shot examples and scoring are those of nanochat's core_eval.py, so that scores are comparable
with its leaderboard. core_bundle.py reads the tasks.
"""
# B rows of a batch, T tokens of a row, D width, V vocab, N tokens that are scored

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.train.data.rows import prefetch
from hotlap.train.distributed.world import World
from hotlap.train.evaluation.batching import by_length, failing_as
from hotlap.train.evaluation.core_bundle import Task
from hotlap.train.evaluation.intervals import centred, centred_mean, counted

SHOTS_SEED = 1234  # nanochat's; it selects the few-shot examples
WINDOW = 256  # examples sorted by length at a time
SCORED_AT_ONCE = 2048  # tokens whose logits are in memory at a time


@dataclass(frozen=True)
class Row:
    """A sequence for the model to read; its tokens from `start` on are scored."""

    ids: list[int]
    start: int


def candidates(task: Task, example: dict) -> list[str]:
    """The texts of an example: one per answer option; only one for language modelling."""
    if task.kind == "multiple_choice":
        return [f"{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        end = task.delimiter + example["continuation"]
        return [context + end for context in example["context_options"]]
    return [f"{example['context'].strip()}{task.delimiter}{example['continuation']}"]


def prompts(task: Task, index: int) -> list[str]:
    """The prompts for an example: few-shot examples followed by each of its candidates.

    Language modelling has two prompts, without and with the continuation. The first is stripped of its
    trailing space, which tokenizers merge into the continuation's first token.
    """
    picked = random.Random(SHOTS_SEED + index).sample(range(len(task.examples) - 1), task.shots)
    others = [task.examples[i + (i >= index)] for i in picked]  # any but this one
    opening = "".join(candidates(task, other)[other.get("gold", 0)] + "\n\n" for other in others)
    example = task.examples[index]
    if task.kind == "language_modeling":
        before = (opening + example["context"].strip() + task.delimiter).strip()
        return [before, opening + candidates(task, example)[0]]
    return [opening + candidate for candidate in candidates(task, example)]


def rows(task: Task, index: int, sequences: list[list[int]]) -> list[Row]:
    """The tokens of an example's prompts and where scoring starts: after the common prefix, or for a schema
    at the common suffix.
    """
    if task.kind == "multiple_choice":
        start = shared_length(sequences)
        return [Row(ids, start) for ids in sequences]
    if task.kind == "schema":
        shared = shared_length([ids[::-1] for ids in sequences])
        return [Row(ids, len(ids) - shared) for ids in sequences]
    before, whole = sequences
    if len(before) == len(whole) or whole[: len(before)] != before:
        raise DataError(
            f"{task.label}, example {index}: the prompt's tokens are not a prefix of those with the "
            f"continuation {task.examples[index]['continuation']!r}, so it cannot be scored"
        )
    return [Row(whole, len(before))]


def shared_length(sequences: list[list[int]]) -> int:
    """Length of the common prefix of all sequences."""
    for length, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return min(map(len, sequences))


def cropped(row: Row, context: int, task: Task) -> Row:
    """The last `context` tokens of a row. Raises ValueError if that would drop scored tokens."""
    extra = max(0, len(row.ids) - context)
    if extra and row.start <= extra:
        raise ValueError(
            f"{task.label} scores {len(row.ids) - row.start} tokens of an example, which do not fit in the "
            f"model's context of {context}"
        )
    return Row(row.ids[extra:], row.start - extra)


Example = tuple[int, list[Row]]  # index in the task, and its rows


def batches(
    task: Task, tokenizer: Tokenizer, context: int, rank: int = 0, size: int = 1
) -> Iterator[list[Example]]:
    """This rank's examples in batches of similar length. All rows of an example are in the same batch."""
    mine = range(rank, len(task.examples), size)
    for first in range(0, len(mine), WINDOW):
        texts = {index: prompts(task, index) for index in mine[first : first + WINDOW]}
        encoded = iter(tokenizer.encode_batch([text for group in texts.values() for text in group]))
        examples = []
        for index, group in texts.items():
            found = rows(task, index, [[tokenizer.bos, *next(encoded)] for _ in group])
            examples.append((index, [cropped(row, context, task) for row in found]))
        yield from by_length(examples, longest, lambda example: len(example[1]))


def longest(example: Example) -> int:
    return max(len(row.ids) for row in example[1])


@torch.inference_mode()
def read_on(model: Transformer, read: list[Row], tokenizer: Tokenizer) -> tuple[list[Tensor], list[Tensor]]:
    """For each row: the losses of its scored tokens in nats, and whether each token was the most likely one.

    Raises FloatingPointError if a logit is not finite.
    """
    device = model.embedding.weight.device
    T = max(len(row.ids) for row in read)
    ids = torch.tensor([row.ids + [tokenizer.bos] * (T - len(row.ids)) for row in read], device=device)
    places = [(b, t) for b, row in enumerate(read) for t in range(max(row.start, 1), len(row.ids))]
    b, t = torch.tensor(places, dtype=torch.int64, device=device).reshape(-1, 2).T
    hidden, targets = model.hidden(ids)[b, t - 1], ids[b, t]  # (N, D), (N,)
    losses, likeliest, finite = [], [], []
    for part, target in zip(hidden.split(SCORED_AT_ONCE), targets.split(SCORED_AT_ONCE), strict=True):
        logits = model.logits(part)[:, : tokenizer.vocab_size]  # (N, V), without padding
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        likeliest.append(logits.argmax(-1) == target)
        finite.append(logits.isfinite().all())
    if not torch.stack(finite).all():
        raise FloatingPointError("the logits are not finite; the model has diverged or is damaged")
    counts = [len(row.ids) - max(row.start, 1) for row in read]
    return list(torch.cat(losses).cpu().split(counts)), list(torch.cat(likeliest).cpu().split(counts))


def is_right(task: Task, index: int, losses: list[Tensor], likeliest: list[Tensor]) -> bool:
    if task.kind == "language_modeling":
        return bool(likeliest[0].all())
    # An option that is a prefix of all others has no token to score. Its mean is NaN, which wins if it comes
    # first and loses otherwise. nanochat does this by accident; we keep it so that scores are comparable.
    means = [loss.mean().item() for loss in losses]
    return min(range(len(means)), key=means.__getitem__) == task.examples[index]["gold"]


def count_right(model: Transformer, tokenizer: Tokenizer, task: Task, world: World, bar: tqdm) -> int:
    """How many of a task's examples the model gets right, over all ranks; collective."""
    right = 0
    for batch in prefetch(batches(task, tokenizer, model.config.context, world.rank, world.size)):
        losses, likeliest = read_on(model, [row for _, read in batch for row in read], tokenizer)
        first = 0
        for index, read in batch:
            part = slice(first, first + len(read))
            right += is_right(task, index, losses[part], likeliest[part])
            first += len(read)
        bar.update(len(batch))
    return int(world.total(right)[0])


def evaluate_core(model: Transformer, tokenizer: Tokenizer, tasks: list[Task], world: World) -> dict:
    """CORE, the mean over tasks of (accuracy - chance) / (1 - chance), and each task's accuracy; collective.

    95 % intervals are Wilson's for accuracies; for CORE, the tasks' are added in quadrature, as if
    independent. model: whole on each rank. Prompts longer than its context lose their beginning, as in
    nanochat.
    """
    total = sum(len(range(world.rank, len(task.examples), world.size)) for task in tasks)
    scores: dict[str, dict] = {}
    with tqdm(
        total=total, unit="example", desc="CORE", dynamic_ncols=True, disable=None if world.is_main else True
    ) as bar:
        for task in tasks:
            with failing_as(task.label):
                right = count_right(model, tokenizer, task, world, bar)
            score = counted(right, len(task.examples))
            scores[task.label] = centred(score, task.chance) | {"shots": task.shots}
            bar.clear()
            log.info("%s: %.2f %% of %d correct", task.label, 100 * score["accuracy"], len(task.examples))
    core, interval = centred_mean(list(scores.values()))
    return {"core": core, "interval": interval, "tasks": scores}

"""Preference pairs from a chat model's own answers to questions of the built-in tasks.

It makes up answers to questions about names that it was not taught (tasks/unknown_names.py): there the honest
sentence is preferred. Where it knows the answer, a right one is preferred: to what it said, if that was
wrong, else to the honest sentence, so that it does not learn to say that always.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from hotlap.common.files import write
from hotlap.common.log import log
from hotlap.model.config import Sampling
from hotlap.model.conversation import parse_answer, render_prompt
from hotlap.model.engine import Engine
from hotlap.train.data.conversation_files import json_records
from hotlap.train.data.preferences import FORM, Pair, checked_pair
from hotlap.train.data.tasks import facts, refusals, unknown_names
from hotlap.train.evaluation.questions import ANSWER_TOKENS, load_engine

SAMPLES = "pairs.jsonl"
UNKNOWN_PHRASINGS, FACT_PHRASINGS, REFUSALS = 3, 2, 200  # questions a name, a fact, and of other topics


def sample_pairs(base: Path, path: Path, seed: int, device: torch.device) -> None:
    """Ask the base, and write the pairs as lines of JSON."""
    records = list(sampled_records(load_engine(base, device), seed))
    write(path, "".join(json.dumps(record) + "\n" for record in records))
    log.info("%s: %d pairs from the answers of %s", path, len(records), base)


def sampled_records(engine: Engine, seed: int) -> Iterator[dict]:
    """Pairs in TRL's form, with their split."""
    for split, made in (
        ("train", unknown_names.training_questions(UNKNOWN_PHRASINGS, seed)),
        ("validation", unknown_names.held_out_questions()),
    ):
        for question, said in zip(made, answers(engine, made, seed), strict=True):
            yield from pair(question, unknown_names.HONEST, said, split)
    known = known_questions(seed)
    found = answers(engine, [question for question, _ in known], seed)
    for (question, right), said in zip(known, found, strict=True):
        wrong = says(right) != said
        yield from pair(question, right, said if wrong else says(unknown_names.HONEST), "train")


def known_questions(seed: int) -> list[tuple[str, str]]:
    """Questions and right answers, in trained phrasings: about facts, and about what is to be refused."""
    generator = random.Random(f"known questions {seed}")
    asked = [
        (phrasing.format(fact.name), fact.answer)
        for fact in facts.facts()
        for phrasing in generator.sample(facts.PHRASINGS, FACT_PHRASINGS)
    ]
    refused = refusals.training_conversations(REFUSALS, seed)
    return [*asked, *((talk[0]["content"], refusals.REFUSAL) for talk in refused)]


def answers(engine: Engine, questions: list[str], seed: int) -> list[list[dict]]:
    """The messages of a sampled answer to each question; none of one that has not come to its end."""
    prompts = [render_prompt([{"role": "user", "content": q}], engine.tokenizer) for q in questions]
    sampling = Sampling(temperature=1, top_k=0, max_tokens=ANSWER_TOKENS, seed=seed)
    found = engine.complete(prompts, sampling)
    return [parse_answer(ids, engine.tokenizer) if len(ids) < ANSWER_TOKENS else [] for ids in found]


def pair(question: str, chosen: str, rejected: list[dict], split: str) -> Iterator[dict]:
    """One record; none if the model said nothing, or the same."""
    if rejected and rejected != says(chosen):
        prompt = [{"role": "user", "content": question}]
        yield {"prompt": prompt, "chosen": says(chosen), "rejected": rejected, "split": split}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def read_samples(path: Path) -> Iterator[Pair]:
    """The pairs that `sample_pairs` has written."""
    for place, record in json_records(path, FORM):
        yield checked_pair(place, record)._replace(split=record["split"])

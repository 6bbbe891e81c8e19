"""Preference pairs from a chat model's own answers to questions of the built-in tasks.

It makes up answers to questions about names that it was not taught (tasks/unknown_names.py): there the
refusal is preferred. Where the answer is known, that one is preferred: to what the model said, if that was
wrong, else to the refusal, so that it does not learn to refuse everything.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from hotlap.common.errors import DataError
from hotlap.common.files import write
from hotlap.common.log import log
from hotlap.model.config import Sampling
from hotlap.model.conversation import parse_answer, render_prompt
from hotlap.model.engine import Engine
from hotlap.train.data.preferences import FORM, Pair, checked_pair
from hotlap.train.data.record_files import json_records
from hotlap.train.data.sources import split_documents
from hotlap.train.data.splits import SPLITS
from hotlap.train.data.tasks import arithmetic, facts, refusals, spelling, unknown_names
from hotlap.train.evaluation.questions import ANSWER_TOKENS, load_engine

SAMPLES = "pairs.jsonl"
UNKNOWN_PHRASINGS, FACT_PHRASINGS = 3, 3  # questions a name, and a fact
REFUSALS, SUMS, SPELLINGS = 200, 150, 150  # questions of these tasks
MISTAKES = 1.5  # temperature at which a model also says wrong what it knows


def sample_pairs(base: Path, path: Path, seed: int, device: torch.device) -> None:
    """Ask the base questions, and write the pairs as lines of JSON. DataError if it cannot read one."""
    try:
        records = list(sampled_records(load_engine(base, device), seed))
    except DataError as error:
        raise DataError(
            f"{base} cannot be asked the questions of `tasks`: {error}; name files with --data"
        ) from None
    write(path, "".join(json.dumps(record) + "\n" for record in records))
    log.info("%s: %d pairs from the answers of %s", path, len(records), base)


def sampled_records(engine: Engine, seed: int) -> Iterator[dict]:
    """Pairs in TRL's form, with their split. There is none where the model said nothing, came to no end, or
    refused rightly.
    """
    refusal = says(refusals.REFUSAL)
    for split, asked in (
        ("train", unknown_names.training_questions(UNKNOWN_PHRASINGS, seed)),
        ("validation", unknown_names.held_out_questions()),
    ):
        for question, said in zip(asked, answers(engine, asked, seed, temperature=1), strict=True):
            if said not in ([], refusal):
                yield record(question, refusal, said, split)
    known = known_conversations(seed)
    found = answers(engine, [question["content"] for question, *_ in known], seed, MISTAKES)
    for (question, *right), said in zip(known, found, strict=True):
        rejected = refusal if said == right else said
        if rejected not in ([], right):
            yield record(question["content"], right, rejected, "train")


def known_conversations(seed: int) -> list[list[dict]]:
    """Questions with right answers, in trained phrasings."""
    generator = random.Random(f"known questions {seed}")
    words = spelling.words(split_documents("pydocs")[0])
    return [
        *(
            facts.conversation(phrasing.format(fact.name), fact.answer)
            for fact in facts.facts()
            for phrasing in generator.sample(facts.PHRASINGS, FACT_PHRASINGS)
        ),
        *refusals.training_conversations(REFUSALS, seed),
        *arithmetic.training_conversations(SUMS, seed),
        *spelling.training_conversations(words, SPELLINGS, seed),
    ]


def answers(engine: Engine, questions: list[str], seed: int, temperature: float) -> list[list[dict]]:
    """The messages of a sampled answer to each question; none of one that has not come to its end."""
    prompts = [render_prompt([{"role": "user", "content": q}], engine.tokenizer) for q in questions]
    sampling = Sampling(temperature=temperature, top_k=0, max_tokens=ANSWER_TOKENS, seed=seed)
    found = engine.complete(prompts, sampling)
    return [parse_answer(ids, engine.tokenizer) if len(ids) < ANSWER_TOKENS else [] for ids in found]


def record(question: str, chosen: list[dict], rejected: list[dict], split: str) -> dict:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def read_samples(path: Path) -> Iterator[Pair]:
    """The pairs that `sample_pairs` has written. DataError if the file is damaged."""
    try:
        for place, found in json_records(path, FORM):
            pair = checked_pair(found)
            if found.get("split") not in SPLITS:
                raise DataError(f"{place} has no split")
            yield pair._replace(place=place, split=found["split"])
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and the base is asked again") from None

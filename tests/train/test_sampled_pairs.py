"""Pairs from a model's own answers."""

import json
from pathlib import Path

import pytest
import torch

from hotlap.model.conversation import render_prompt
from hotlap.train import sampled_pairs
from hotlap.train.data.tasks import facts, refusals, unknown_names
from hotlap.train.data.tasks.unknown_names import HONEST
from hotlap.train.evaluation.questions import ANSWER_TOKENS


class Talker:
    """Stands in for an engine: `answer` says what it replies to a prompt's ids."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer

    def complete(self, prompts, sampling):
        assert sampling.temperature == 1 and sampling.top_k == 0, "the model's own distribution"
        return [self.answer(prompt) for prompt in prompts]


def records(monkeypatch, tokenizer, answer) -> list[dict]:
    monkeypatch.setattr(
        facts, "facts", lambda: [facts.Fact("len", "Return it."), facts.Fact("abs", "Its value.")]
    )
    monkeypatch.setattr(
        unknown_names, "names", lambda: ["str.flatten", "numpy.dot", "csv.reader", "zip_with"]
    )
    monkeypatch.setattr(
        refusals, "training_conversations", lambda count, seed: [facts.conversation("Hi?", "No.")]
    )
    return list(sampled_pairs.sampled_records(Talker(tokenizer, answer), seed=0))


def asked(record: dict) -> str:
    return record["prompt"][0]["content"]


def test_what_is_made_up_is_rejected_and_what_is_right_is_chosen(monkeypatch, tiny_tokenizer):
    found = records(monkeypatch, tiny_tokenizer, lambda prompt: tiny_tokenizer.encode("Return it."))
    assert {asked(record) for record in found if record["split"] == "validation"} <= set(
        unknown_names.held_out_questions()
    )
    for record in found:
        chosen, rejected = (record[side][-1]["content"] for side in ("chosen", "rejected"))
        if "len" in asked(record):
            assert (chosen, rejected) == ("Return it.", HONEST)  # it knew
        elif "abs" in asked(record):
            assert (chosen, rejected) == ("Its value.", "Return it.")
        elif asked(record) == "Hi?":
            assert (chosen, rejected) == (refusals.REFUSAL, "Return it.")
        else:
            assert (chosen, rejected) == (HONEST, "Return it.")
    assert {"train", "validation"} == {record["split"] for record in found}


def test_an_honest_an_empty_and_an_unfinished_answer_make_no_pair(monkeypatch, tiny_tokenizer):
    said = {"str.flatten": tiny_tokenizer.encode(HONEST), "numpy.dot": [], "csv.reader": [5] * ANSWER_TOKENS}
    ids = {
        name: tiny_tokenizer.encode("x") if name == "zip_with" else answer for name, answer in said.items()
    }

    def answer(prompt):
        text = tiny_tokenizer.decode(prompt)
        return next((ids[name] for name in ids if name in text), tiny_tokenizer.encode("x"))

    unknown = [r for r in records(monkeypatch, tiny_tokenizer, answer) if r["chosen"][0]["content"] == HONEST]
    assert unknown and all("zip_with" in asked(record) for record in unknown)


def test_samples_are_read_as_they_were_written_with_their_split(monkeypatch, tiny_tokenizer, tmp_path):
    made = records(monkeypatch, tiny_tokenizer, lambda prompt: tiny_tokenizer.encode("Return it."))
    monkeypatch.setattr(sampled_pairs, "load_engine", lambda *_: None)
    monkeypatch.setattr(sampled_pairs, "sampled_records", lambda engine, seed: made)
    path = tmp_path / sampled_pairs.SAMPLES
    sampled_pairs.sample_pairs(Path("base"), path, 0, torch.device("cpu"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == made
    read = list(sampled_pairs.read_samples(path))
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.split) for pair in read] == [
        (record["prompt"], record["chosen"], record["rejected"], record["split"]) for record in made
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_known_questions_are_in_trained_phrasings_with_their_right_answers(seed):
    answers = {fact.name: fact.answer for fact in facts.facts()}
    found = sampled_pairs.known_questions(seed)
    about = [(q, a) for q, a in found if a != refusals.REFUSAL]
    assert len(about) == sampled_pairs.FACT_PHRASINGS * len(answers)
    assert all(
        any(q == p.format(n) and a == answers[n] for p in facts.PHRASINGS for n in answers)
        for q, a in about[:40]
    )
    assert len(found) - len(about) == sampled_pairs.REFUSALS


def test_prompts_of_the_questions_are_readable(tiny_tokenizer):
    for question in unknown_names.held_out_questions():
        assert render_prompt([{"role": "user", "content": question}], tiny_tokenizer)

"""Pairs from a model's own answers."""

import json
from pathlib import Path

import pytest
import torch

from hotlap.common.errors import DataError
from hotlap.model.conversation import render_prompt
from hotlap.train import sampled_pairs
from hotlap.train.data.tasks import facts, refusals, unknown_names
from hotlap.train.evaluation.questions import ANSWER_TOKENS


class Talker:
    """Stands in for an engine: `answer` says what it replies to a prompt's ids."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer

    def complete(self, prompts, sampling):
        assert sampling.temperature >= 1 and sampling.top_k == 0, "nothing that it may say is left out"
        return [self.answer(prompt) for prompt in prompts]


def records(monkeypatch, tokenizer, answer) -> list[dict]:
    known = [("About len?", "Return it."), ("About abs?", "Its value.")]
    monkeypatch.setattr(
        sampled_pairs, "known_conversations", lambda seed: [facts.conversation(*k) for k in known]
    )
    monkeypatch.setattr(
        unknown_names, "names", lambda: ["str.flatten", "numpy.dot", "csv.reader", "zip_with"]
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
            assert (chosen, rejected) == ("Return it.", refusals.REFUSAL)  # it knew
        elif "abs" in asked(record):
            assert (chosen, rejected) == ("Its value.", "Return it.")
        else:
            assert (chosen, rejected) == (refusals.REFUSAL, "Return it.")
    assert {"train", "validation"} == {record["split"] for record in found}


def test_a_right_refusal_and_no_answer_and_one_without_an_end_make_no_pair(monkeypatch, tiny_tokenizer):
    encode = tiny_tokenizer.encode
    ids = {
        "str.flatten": encode(refusals.REFUSAL), "numpy.dot": [], "csv.reader": [5] * ANSWER_TOKENS,
        "About": encode(refusals.REFUSAL),
    }  # fmt: skip

    def answer(prompt):
        text = tiny_tokenizer.decode(prompt)
        return next((ids[name] for name in ids if name in text), tiny_tokenizer.encode("x"))

    made = {asked(record) for record in records(monkeypatch, tiny_tokenizer, answer)}
    assert made and all("zip_with" in question or "About" in question for question in made)
    ids = dict.fromkeys(["zip_with", "str.flatten"], encode(refusals.REFUSAL))
    assert not {
        q for q in map(asked, records(monkeypatch, tiny_tokenizer, answer)) if any(name in q for name in ids)
    }


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


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "cho', '{"prompt": "a", "chosen": "b", "rejected": "c"}', "{}"]
)
def test_a_damaged_file_of_samples_is_named_with_a_way_out(line, tmp_path):
    path = tmp_path / sampled_pairs.SAMPLES
    path.write_text(line)
    with pytest.raises(DataError, match=r"pairs\.jsonl is damaged \(.*\); remove it, and the base is asked"):
        list(sampled_pairs.read_samples(path))


def test_known_questions_are_of_every_task_in_trained_phrasings(monkeypatch):
    monkeypatch.setattr(
        sampled_pairs, "split_documents", lambda name: (["some words to spell in letters"], [])
    )
    answers = {fact.name: fact.answer for fact in facts.facts()}
    talks = sampled_pairs.known_conversations(0)
    count = sampled_pairs.FACT_PHRASINGS * len(answers)
    for question, answer in talks[:40]:
        assert any(
            question["content"] == phrasing.format(name) and answer["content"] == answers[name]
            for phrasing in facts.PHRASINGS
            for name in answers
        )
    others = talks[count:]
    assert sum(talk[-1]["content"] == refusals.REFUSAL for talk in others) == sampled_pairs.REFUSALS
    assert sum("tool_calls" in talk[1] for talk in others) == sampled_pairs.SUMS
    assert len(others) == sampled_pairs.REFUSALS + sampled_pairs.SUMS + sampled_pairs.SPELLINGS
    assert talks == sampled_pairs.known_conversations(0) != sampled_pairs.known_conversations(1)


def test_prompts_of_the_questions_are_readable(tiny_tokenizer):
    for question in unknown_names.held_out_questions():
        assert render_prompt([{"role": "user", "content": question}], tiny_tokenizer)

"""What a model is worth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import conversation
from tools import tiny_config

from hotlap.model.conversation import render
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.weights import save_model
from hotlap.train import evaluate
from hotlap.train.conversations import conversation_rows
from hotlap.train.data import Documents, PackedRows
from hotlap.train.dist import joined
from hotlap.train.evaluate import EvalConfig, evaluate_model, share_right, validation
from hotlap.train.optim import MuonAdamW, OptimConfig

TEXTS = ["Je préfère les gâteaux", "The dog does not mind.", "5"]


def documents(tokenizer) -> Documents:
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in TEXTS]
    starts = [0, len(ids[0]), len(ids[0]) + len(ids[1])]
    return Documents(np.concatenate(ids), np.array(starts))


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_bits_per_byte_are_those_counted_by_hand(tiny_tokenizer, random_model, batch_rows):
    model = random_model(tiny_config())
    rows = PackedRows([lambda: documents(tiny_tokenizer)], 64, 0, shuffle=False)
    with joined() as world:
        scores = validation(model, rows, tiny_tokenizer, batch_rows, 0, world)
    nats, text_nats, count = 0.0, 0.0, 0
    for i, text in enumerate(TEXTS):
        ids = [tiny_tokenizer.bos, *tiny_tokenizer.encode(text)]
        following = [*ids[1:], tiny_tokenizer.bos] if i + 1 < len(TEXTS) else ids[1:]
        logs = model(torch.tensor([ids[: len(following)]]))[0].double().log_softmax(-1)
        losses = [-logs[t, token].item() for t, token in enumerate(following)]
        nats, count = nats + sum(losses), count + len(losses)
        text_nats += sum(losses[: len(ids) - 1])
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores["validation_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scores["validation_bpb"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-5)


@pytest.fixture(scope="module")
def engine(tiny_tokenizer) -> Engine:
    """A model that has learnt two answers by heart."""
    model = GPT(tiny_config(softcap=30.0)).init_weights()
    optimizer = MuonAdamW(model, OptimConfig(weight_decay=0.0))
    talks = [conversation("dog?", "fox"), conversation("2 + 3?", "It is 5.")]
    rows = conversation_rows(talks, tiny_tokenizer, 64, 0, False)
    batch = rows.batch(0, rows.epoch_rows())
    for _ in range(60):
        (model(batch.inputs, batch.targets, document_start=batch.document_start) / batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Engine(model.eval(), tiny_tokenizer)


def test_the_share_of_right_answers_counts_and_shows_the_wrong_ones(engine):
    examples = [("dog?", "fox"), ("2 + 3?", "It  is\n5."), ("dog?", "cat"), ("2 + 3?", "It is 6.")]
    share, wrong = share_right(engine, examples)
    assert share == 0.5
    assert wrong == [("dog?", "cat", "fox"), ("2 + 3?", "It is 6.", "It is 5.")]


def test_a_model_with_nan_fails_and_is_not_scored(tiny_tokenizer):
    model = GPT(tiny_config()).init_weights()
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight[0, 0] = float("nan")
        model.blocks[0].mlp.proj.weight += 0.1
    with pytest.raises(FloatingPointError, match="not finite"):
        share_right(Engine(model, tiny_tokenizer), [("dog?", "fox")])
    rows = PackedRows([lambda: documents(tiny_tokenizer)], 64, 0, shuffle=False)
    with joined() as world, pytest.raises(FloatingPointError, match="not finite"):
        validation(model, rows, tiny_tokenizer, 2, 0, world)


def test_scores_and_wrong_answers_are_written_once(tmp_path, engine, monkeypatch):
    save_model(tmp_path, engine.model, engine.tokenizer)
    monkeypatch.setitem(evaluate.TASKS, "facts", lambda: [("dog?", "fox"), ("dog?", "cat")])
    config = EvalConfig(tmp_path, ("facts",), tmp_path / "scores.json")
    assert evaluate_model(config) == {"facts": 0.5}
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scores"] == {"facts": 0.5} and len(saved["wrong"]["facts"]) == 1
    with pytest.raises(FileExistsError, match=r"scores\.json exists"):
        evaluate_model(config)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sums'; known: facts, arithmetic, spelling"):
        evaluate_model(EvalConfig(tasks=("facts", "sums")))


def test_a_folder_that_is_missing_shows_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate_model(EvalConfig(Path("nothing"), out=tmp_path / "none" / "scores.json"))


def test_the_built_in_tasks_have_questions_that_fit_a_small_context(tiny_tokenizer):
    for task, examples in evaluate.TASKS.items():
        questions = examples()
        assert len(questions) >= 100, task
        assert questions == examples()
        for question, answer in questions[:20]:
            assert len(render(conversation(question, answer), tiny_tokenizer)[0]) < 512

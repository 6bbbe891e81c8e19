"""What a model is worth."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.core_bundles import letters, mixed_tasks, write_bundle
from helpers.small_runs import conversation
from helpers.talks import rows_of
from helpers.tools import tiny_config

from hotlap.common.errors import DataError
from hotlap.common.terminal import printable
from hotlap.model.conversation import render
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer, train_characters
from hotlap.model.weights import STATE, save_model
from hotlap.train.data.rows import PackedRows
from hotlap.train.data.shards import Documents, write_shards
from hotlap.train.data.sources import split_documents
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation import command, questions
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.questions import wrong_answers
from hotlap.train.evaluation.table import as_table
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig

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
        scores = validation(model, rows, tiny_tokenizer, batch_rows, world)
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
    rows = rows_of(talks, tiny_tokenizer)
    batch = rows.batch(0, rows.epoch_rows())
    for _ in range(60):
        (model(batch.inputs, batch.targets, document_start=batch.document_start) / batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Engine(model.eval(), tiny_tokenizer)


def test_wrong_answers_are_those_that_differ_in_more_than_whitespace(engine):
    examples = [("dog?", "fox"), ("2 + 3?", "It  is\n5."), ("dog?", "cat"), ("2 + 3?", "It is 6.")]
    assert wrong_answers(engine, examples) == [("dog?", "cat", "fox"), ("2 + 3?", "It is 6.", "It is 5.")]


def test_a_model_with_nan_fails_and_is_not_scored(tiny_tokenizer):
    model = GPT(tiny_config()).init_weights()
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight[0, 0] = float("nan")
        model.blocks[0].mlp.proj.weight += 0.1
    with pytest.raises(FloatingPointError, match="not finite"):
        wrong_answers(Engine(model, tiny_tokenizer), [("dog?", "fox")])
    rows = PackedRows([lambda: documents(tiny_tokenizer)], 64, 0, shuffle=False)
    with joined() as world, pytest.raises(FloatingPointError, match="not finite"):
        validation(model, rows, tiny_tokenizer, 2, world)


def test_scores_and_wrong_answers_are_written_once(tmp_path, engine, monkeypatch):
    save_model(tmp_path, engine.model, engine.tokenizer)
    monkeypatch.setitem(questions.TASKS, "facts", lambda: [("dog?", "fox"), ("dog?", "cat")])
    config = EvalConfig(tmp_path, ("facts",), out=tmp_path / "scores.json")
    found = evaluate_model(config)
    assert found["scores"]["facts"] == {
        "accuracy": 0.5,
        "n": 2,
        "interval": pytest.approx([0.0945, 0.9055], abs=1e-4),
    }
    assert found["wrong"] == {"facts": [("dog?", "cat", "fox")]}
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved == json.loads(json.dumps(found))
    assert {"model", "folder", "stage", "date", "device", "dtype", "versions"} <= set(saved)
    with pytest.raises(FileExistsError, match=r"scores\.json exists"):
        evaluate_model(config)


@pytest.fixture
def base(tmp_path, random_model) -> Path:
    """The directory of a base model of letters."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(folder, random_model(tiny_config(vocab_size=64)), letters())
    (folder / STATE).write_text('{"stage": "pretrain"}')
    return folder


def test_everything_that_a_base_model_can_be_asked(tmp_path, base, monkeypatch):
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(command, "OPENINGS", ("a bad", "abc"))
    (tmp_path / "text.txt").write_text("a bad deed\n" * 40)
    config = EvalConfig(
        base, ("samples", "core", "bpb"), data=tmp_path / "text.txt", validation_tokens=3,
        core_bundle=write_bundle(tmp_path, mixed_tasks(count=5)), max_per_task=4, out=tmp_path / "all.json",
    )  # fmt: skip
    found = evaluate_model(config)
    assert set(found["scores"]) == {"bpb", "core"} and found["stage"] == "pretrain"
    assert found["scores"]["bpb"]["rows"] == 1 and found["scores"]["bpb"]["bpb"] > 0
    assert all(task["n"] == 4 for task in found["scores"]["core"]["tasks"].values())
    assert [text for text, _ in found["samples"]] == ["a bad", "abc"]
    shown = as_table(found)
    for text in ("bpb", "core", "5 tasks", "going_on", "> a bad", f"{found['scores']['core']['core']:.4f}"):
        assert text in shown


def test_bits_per_byte_are_those_of_the_validation_split_as_text_or_shards(tmp_path, base):
    text, folder = tmp_path / "text.txt", tmp_path / "shards"
    text.write_text("a bad deed, a cab\n".replace(",", "") * 40)
    folder.mkdir()
    for split, documents_ in zip(("train", "validation"), split_documents(str(text)), strict=True):
        write_shards(folder, split, documents_, letters())
    of_text, of_shards = (
        evaluate_model(EvalConfig(base, ("bpb",), data=source))["scores"]["bpb"] for source in (text, folder)
    )
    assert of_text == of_shards and of_text["rows"] > 1
    train_characters("xyz").save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        evaluate_model(EvalConfig(base, ("bpb",), data=folder))


def test_a_chat_model_s_samples_are_answers(tmp_path, engine, monkeypatch):
    save_model(tmp_path, engine.model, engine.tokenizer)
    monkeypatch.setattr(command, "QUESTIONS", ("dog?", "2 + 3?"))
    found = evaluate_model(EvalConfig(tmp_path, ("samples",)))
    assert found["samples"] == [("dog?", "fox"), ("2 + 3?", "It is 5.")] and found["scores"] == {}


def test_a_base_model_is_not_asked_questions(base):
    with pytest.raises(ValueError, match="a base model, and facts, spelling need a chat model"):
        evaluate_model(EvalConfig(base, ("core", "facts", "spelling")))


def test_what_is_missing_shows_before_the_model_is_loaded(tmp_path, base, monkeypatch):
    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(questions, "load_model", loaded)
    with pytest.raises(ValueError, match="bpb needs text; give it, or a folder of shards, with --data"):
        evaluate_model(EvalConfig(base, ("bpb",)))
    with pytest.raises(FileNotFoundError, match="no text files match"):
        evaluate_model(EvalConfig(base, ("bpb",), data=tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"no core\.yaml in .*--core-bundle"):
        evaluate_model(EvalConfig(base, ("core",), core_bundle=tmp_path / "none"))
    with pytest.raises(ValueError, match="no --tasks; known: bpb"):
        evaluate_model(EvalConfig(base, ()))
    monkeypatch.setattr(command, "OPENINGS", ("0",))
    with pytest.raises(DataError, match="character '0' is not among"):
        evaluate_model(EvalConfig(base, ("samples",)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["a", "a 7?"], "cannot read the questions of facts: character '7'"),
        (
            ["a" * 70],
            "facts has no question that fits in the model's context of 64 tokens, of 1;",
        ),
        ([], "facts has no question that fits"),
    ],
)
def test_questions_that_the_model_cannot_read_are_refused_before_it_is_loaded(asked, said, base, monkeypatch):
    (base / STATE).unlink()
    monkeypatch.setattr(questions, "load_model", lambda *given: pytest.fail("loaded"))
    monkeypatch.setitem(questions.TASKS, "facts", lambda: [(text, "b") for text in asked])
    with pytest.raises(ValueError, match=said):
        evaluate_model(EvalConfig(base, ("facts",)))


def test_samples_steer_no_terminal_and_stay_exact_in_the_file(tmp_path, base, monkeypatch, capsys):
    monkeypatch.setattr(command, "OPENINGS", ("a bad",))
    monkeypatch.setattr(command, "greedy", lambda engine, prompts: prompts)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2Jbad\x9b")
    config = EvalConfig(base, ("samples",), out=tmp_path / "out.json")
    command.main(config)
    printed = capsys.readouterr().out
    assert "[2Jbad\n" in printed and printable(printed) == printed
    assert json.loads((tmp_path / "out.json").read_text())["samples"] == [["a bad", "\x1b[2Jbad\x9b"]]


def test_a_full_disk_does_not_lose_the_scores(base, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(command, "OPENINGS", ("a bad",))
    monkeypatch.setattr(command, "write_object", full)
    with pytest.raises(OSError, match="No space left"):
        command.main(EvalConfig(base, ("samples",), out=tmp_path / "out.json"))
    assert str(base) in capsys.readouterr().out


def test_without_a_folder_core_is_downloaded(tmp_path, base, monkeypatch):
    bundle = write_bundle(tmp_path, mixed_tasks(count=4))
    monkeypatch.setattr(command, "core_bundle", lambda folder: bundle)
    assert len(evaluate_model(EvalConfig(base, ("core",)))["scores"]["core"]["tasks"]) == 5


@pytest.mark.parametrize("task", ["bpb", "core", "samples"])
def test_nothing_is_scored_where_weights_are_nan(tmp_path, base, task, random_model, monkeypatch):
    monkeypatch.setattr(command, "OPENINGS", ("a bad",))
    model = random_model(tiny_config(vocab_size=64))
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight[0, 0] = float("nan")
    save_model(base, model, letters())
    (tmp_path / "text.txt").write_text("a bad deed\n" * 40)
    write_bundle(tmp_path, mixed_tasks(count=4))
    config = EvalConfig(
        base, (task,), data=tmp_path / "text.txt", core_bundle=tmp_path, out=tmp_path / "out.json"
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate_model(config)
    assert not config.out.exists()


def test_a_model_after_the_tasks_is_told_from_a_task(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a path, not a task; put the model before --tasks"):
        evaluate_model(EvalConfig(tasks=("facts", str(tmp_path))))


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown task 'sums'; known: bpb, core, samples, arc-easy, .*, humaneval, facts",
    ):
        evaluate_model(EvalConfig(tasks=("facts", "sums")))


def test_a_folder_that_is_missing_shows_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate_model(EvalConfig(Path("nothing"), out=tmp_path / "none" / "scores.json"))


def test_the_built_in_tasks_have_questions_that_fit_a_small_context(tiny_tokenizer):
    for task, examples in questions.TASKS.items():
        asked = examples()
        assert len(asked) >= 100, task
        assert asked == examples()
        for question, answer in asked[:20]:
            assert len(render(conversation(question, answer), tiny_tokenizer)[0]) < 512

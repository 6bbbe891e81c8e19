"""`hotlap eval --tasks humaneval`: answers in a chat, tested in the sandbox."""

import json

import pytest
from helpers.code_problems import ADD, TWICE, archive_of
from helpers.package_server import serving
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sandbox import find_sandbox
from hotlap.model.weights import save_model
from hotlap.train.data.tasks import humaneval
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation import chat_tasks
from hotlap.train.evaluation.chat_tasks import ask, examine
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.table import as_table


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    if find_sandbox() is None:
        pytest.skip("no sandbox works on this machine")


@pytest.fixture
def index(tmp_path, monkeypatch):
    with serving(humaneval, archive_of(ADD, TWICE, ADD), monkeypatch, tmp_path / "cache") as server:
        humaneval.download_problems()
        yield server


def test_answers_that_pass_their_tests_are_right(index, tiny_tokenizer):
    t = tiny_tokenizer
    asked = ask("humaneval", t, 512)
    said = [
        "return a + b",
        "```python\n" + TWICE["prompt"] + TWICE["canonical_solution"] + "```",
        "return a - b",
    ]
    scripts = [script(len(p), t.encode(text)) for p, text in zip(asked.prompts, said, strict=True)]
    model = ScriptedModel(tiny_config(context=512), scripts, t.special["<|assistant_end|>"])
    with joined() as world:
        score, wrong = examine(Engine(model, t, slots=3), asked, world)
    assert (score["accuracy"], score["n"]) == (2 / 3, 3) and len(score["interval"]) == 2
    assert wrong == [(ADD["prompt"], ADD["prompt"] + ADD["canonical_solution"], "return a - b")]


def test_a_problem_that_does_not_fit_is_left_out_and_counted(index, tiny_tokenizer):
    lengths = sorted(len(prompt) for prompt in ask("humaneval", tiny_tokenizer, 512).prompts)
    assert ask("humaneval", tiny_tokenizer, lengths[-1]).left_out == 3 - lengths.index(lengths[-1])


def test_the_command_downloads_scores_and_writes(index, tiny_tokenizer, monkeypatch, tmp_path):
    humaneval.ARCHIVE.path.unlink()
    monkeypatch.setattr(chat_tasks, "CODE_TOKENS", 4)
    model = tmp_path / "model"
    model.mkdir()
    save_model(model, GPT(tiny_config(context=512)).init_weights(), tiny_tokenizer)
    out = tmp_path / "scores.json"
    found = evaluate_model(EvalConfig(model, ("humaneval",), out=out))
    assert found["scores"]["humaneval"]["n"] == 3 and len(found["wrong"]["humaneval"]) == 3
    assert found["scores"]["chatcore"]["missing"] == ["arc-easy", "arc-challenge", "mmlu", "gsm8k"]
    assert "humaneval" in as_table(found)
    assert json.loads(out.read_text())["scores"]["humaneval"]["accuracy"] == 0

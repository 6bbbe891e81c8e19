"""Tasks for chat models: where their questions are from, how they are answered, and what is right."""

import json
import math

import pytest
import torch
from helpers.chat_questions import (
    arc,
    examined,
    mmlu,
    problem,
    random_engine,
    small_tasks,
    write_test_split,
)
from helpers.fake_sandbox import FakeSandbox
from helpers.hub_data import add_split
from helpers.ranks import in_world, run_ranks
from helpers.tools import ScriptedModel, script, tiny_config

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow.parquet")

from hotlap.common.errors import DataError
from hotlap.model.conversation import render
from hotlap.model.engine import Engine
from hotlap.model.tokenizer import train_bpe, train_characters
from hotlap.model.weights import save_model
from hotlap.train.data.datasets import ARC_EASY, GSM8K, MMLU
from hotlap.train.data.tasks import multiple_choice
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation import batching, chat_tasks, questions
from hotlap.train.evaluation.chat_tasks import ask, examine, is_solved
from hotlap.train.evaluation.choices import letter_ids
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.table import as_table

CHOICES = ("arc-easy", "arc-challenge", "mmlu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tasks(cache):
    """The public tasks, as they are once they have been downloaded."""
    for dataset, rows in small_tasks():
        write_test_split(dataset, rows)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine()


def score(engine, task: str, context: int = 256) -> tuple[dict, list]:
    with joined() as world:
        return examine(engine, ask(task, engine.tokenizer, context), world)


# Multiple choice


@torch.no_grad()
def answers_alone(engine, task: str) -> list[str]:
    """The likeliest letter of each question, asked alone."""
    found = []
    for item in chat_tasks.questions_of(task):
        logits = engine.model(torch.tensor([questions.question(item.text, engine.tokenizer)]))[0, -1]
        scores = [float(logits[engine.tokenizer.encode(letter)[0]]) for letter in item.letters]
        found.append(item.letters[scores.index(max(scores))])
    return found


@pytest.mark.parametrize("batch_tokens", [1, 500, 16_384])
@pytest.mark.parametrize("task", CHOICES)
def test_the_likeliest_letter_is_the_answer_in_batches_of_any_size(
    engine, tasks, task, batch_tokens, monkeypatch
):
    monkeypatch.setattr(batching, "BATCH_TOKENS", batch_tokens)
    asked, answers = chat_tasks.questions_of(task), answers_alone(engine, task)
    found, wrong = score(engine, task)
    expected = [(q.text, q.answer, a) for q, a in zip(asked, answers, strict=True) if a != q.answer]
    assert wrong == expected and found["n"] == len(asked)
    assert found["accuracy"] == 1 - len(expected) / len(asked)
    assert len(set(answers)) > 1


def test_a_question_has_the_letters_of_its_own_choices(tasks):
    asked = chat_tasks.questions_of("arc-easy")
    assert [q.letters for q in asked[2:5]] == ["ABCD", "ABCDE", "ABC"]
    assert [q.answer for q in asked[2:5]] == ["C", "D", "B"]  # labels 1 to 5 are letters, too
    assert asked[3].text.count("\nE. ") == 1 and asked[4].text.count("\nD. ") == 0


def test_what_is_asked_is_what_fine_tuning_trains_on(tasks, tiny_tokenizer):
    (dataset, _), asked = small_tasks()[0], ask("arc-easy", tiny_tokenizer, 256)
    (path,) = (dataset.folder / name for name in dataset.files["test"])
    trained = [messages for _, messages in multiple_choice.conversations_of(path)]
    for question, prompt, messages in zip(asked.questions, asked.prompts, trained, strict=True):
        answer = letter_ids(question.answer, tiny_tokenizer)
        assert render(messages, tiny_tokenizer)[0] == [
            *prompt,
            *answer,
            tiny_tokenizer.special["<|assistant_end|>"],
        ]


def test_a_letter_that_is_no_token_of_its_own_is_refused(tasks):
    characters = "".join(sorted({c for q in chat_tasks.questions_of("mmlu") for c in q.text} - {"D"}))
    with pytest.raises(DataError, match=r"cannot read the questions of mmlu: .*'D'"):
        ask("mmlu", train_characters(characters), 256)


# Word problems


@pytest.mark.parametrize(
    ("answer", "right"),
    [("6 dogs.\n#### 24", True), ("#### 24.0", True), ("#### 1,024", False), ("24", False), ("", False)],
)
def test_a_problem_is_solved_by_its_final_number(answer, right):
    assert is_solved(answer, "24") == right


def test_a_problem_is_solved_with_the_calculator(tiny_tokenizer, cache):
    write_test_split(GSM8K, [problem(17, 12), problem(2, 3)])
    asked = ask("gsm8k", tiny_tokenizer, 256)
    assert [q.answer for q in asked.questions] == ["204", "6"]
    special, scripts = tiny_tokenizer.special, []
    for prompt, answer in zip(asked.prompts, ("#### 204", "#### 7"), strict=True):
        call = [special["<|tool_start|>"], *tiny_tokenizer.encode("17*12"), special["<|tool_end|>"]]
        after = len(call) + len(tiny_tokenizer.encode("204")) + 2  # the engine says the result
        said = script(len(prompt), call)
        scripts.append(said | script(len(prompt) + after, tiny_tokenizer.encode(answer)))
    model = ScriptedModel(tiny_config(context=256), scripts, special["<|assistant_end|>"])
    found, wrong = score(Engine(model, tiny_tokenizer, slots=2), "gsm8k")
    assert found["accuracy"] == 0.5 and [(expected, answer) for _, expected, answer in wrong] == [
        ("6", "#### 7")
    ]
    result = special["<|result_start|>"], *tiny_tokenizer.encode("204"), special["<|result_end|>"]
    assert str(list(result))[1:-1] in str(model.fed[0])


# All tasks


def test_ranks_share_the_questions_and_agree_on_the_answers(tasks, cache):
    names = (*CHOICES, "gsm8k", "facts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(questions.TASKS, "facts", None)  # restored afterwards, as are the others
        patch.setitem(chat_tasks.PUBLIC, "gsm8k", chat_tasks.PUBLIC["gsm8k"])
        patch.setattr(questions, "ANSWER_TOKENS", 6)
        with joined() as world:
            alone = examined(world, names)
    env = {"XDG_CACHE_HOME": str(cache)}
    assert run_ranks(2, in_world, examined, names, env=env) == [alone, alone]
    assert all(found["n"] > 2 for found, _ in alone.values())


def test_the_suite_is_downloaded_once_and_gives_chatcore(
    engine, hub_server, monkeypatch, cache, tmp_path, caplog
):
    caplog.set_level("INFO", "hotlap")
    FakeSandbox(None).install(monkeypatch)
    for dataset, rows in small_tasks():
        add_split(hub_server, monkeypatch, dataset, "test", rows)
    for task in questions.TASKS:
        monkeypatch.setitem(questions.TASKS, task, lambda: [("dog?", "fox"), ("cat?", "fox")])
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 4)
    save_model(tmp_path, engine.model.float(), engine.tokenizer)
    config = EvalConfig(tmp_path, suite="chat", out=tmp_path / "scores.json")
    found = evaluate_model(config)
    sizes = {task: score["n"] for task, score in found["scores"].items() if task != "chatcore"}
    assert sizes == {
        "arc-easy": 9, "arc-challenge": 8, "mmlu": 7, "gsm8k": 5, "facts": 2, "arithmetic": 2, "spelling": 2,
        "refusals": 2,
    }  # fmt: skip
    core = found["scores"]["chatcore"]
    assert core["missing"] == ["humaneval"] and [*core["tasks"]] == [*chat_tasks.PUBLIC]
    assert "left out: humaneval runs code that the model writes, and needs a sandbox" in caplog.text
    table = as_table(found)
    assert "4 tasks of 5, without humaneval" in table and "with spelling" in table
    assert json.loads(config.out.read_text())["scores"] == json.loads(json.dumps(found["scores"]))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    again = evaluate_model(EvalConfig(tmp_path, ("mmlu", "gsm8k")))
    assert again["scores"]["mmlu"] == found["scores"]["mmlu"] and set(hub_server.fetched().values()) == {1}


def test_questions_that_do_not_fit_are_left_out_and_counted(engine, cache, caplog):
    write_test_split(MMLU, [mmlu(0), mmlu(1), mmlu(2) | {"question": "dog " * 300}])
    found, _ = score(engine, "mmlu")
    assert found["n"] == 2 and found["left_out"] == 1
    assert "mmlu: 1 of 3 questions do not fit in the context of 256 tokens, and are left out" in caplog.text
    with pytest.raises(
        ValueError, match=r"mmlu has no question that fits in .* 32 tokens, of 3; leave it out"
    ):
        ask("mmlu", engine.tokenizer, 32)


def test_a_limit_draws_the_same_questions_for_every_model(engine, tasks):
    other = train_bpe(["What is a dog, a cat, or none?"] * 9, 290)
    drawn = ask("mmlu", engine.tokenizer, 256, limit=3)
    assert len(drawn.prompts) == 3 and drawn.questions == ask("mmlu", other, 1000, limit=3).questions
    assert ask("mmlu", engine.tokenizer, 256, limit=100).questions == chat_tasks.questions_of("mmlu")


@pytest.mark.parametrize("task", ["mmlu", "gsm8k", "refusals"])
def test_a_damaged_model_fails_the_task_by_name_and_has_no_score(tasks, task):
    engine = random_engine()
    engine.model.blocks[0].mlp.fc.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=f"{task} has no score: .*not finite"):
        score(engine, task)


@pytest.mark.parametrize(
    ("dataset", "row", "said"),
    [
        (MMLU, mmlu(1) | {"answer": 4}, r"test-00000.*:2: the answer 4 must be an index of the 4 choices"),
        (ARC_EASY, arc(1) | {"answerKey": "F"}, r":2: the answer 'F' must be one of the labels A, B, C, D"),
        (ARC_EASY, arc(1) | {"choices": {"text": ["a"], "label": ["A", "B"]}}, ":2: the choices need"),
        (GSM8K, problem(1, 2) | {"answer": "two"}, r":2: needs a question, and a solution with ####"),
    ],
)
def test_a_wrong_row_is_named(dataset, row, said, engine, cache):
    good = {"mmlu": mmlu(0), "gsm8k": problem(3, 4)}.get(dataset.name, arc(0))
    write_test_split(dataset, [good, row])
    with pytest.raises(DataError, match=said):
        ask(dataset.name, engine.tokenizer, 256)


def test_without_the_hub_the_missing_file_is_named_before_the_model_is_loaded(
    engine, monkeypatch, cache, tmp_path, hub_server
):
    monkeypatch.setattr(questions, "load_model", lambda *given: pytest.fail("loaded"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    save_model(tmp_path, engine.model.float(), engine.tokenizer)
    with pytest.raises(OSError, match=r"could not download main/test-.* of openai/gsm8k from http://127"):
        evaluate_model(EvalConfig(tmp_path, ("gsm8k",)))


@pytest.mark.parametrize("tasks", [("humaneval",), ("facts", "humaneval")])
def test_what_needs_a_sandbox_is_refused_by_name_where_none_works(tasks, monkeypatch):
    FakeSandbox(None).install(monkeypatch)
    with pytest.raises(ValueError, match="humaneval runs code that the model writes, and needs a sandbox"):
        evaluate_model(EvalConfig(tasks=tasks))


def test_a_suite_and_tasks_exclude_each_other():
    with pytest.raises(ValueError, match="--suite chat is a list of tasks itself"):
        evaluate_model(EvalConfig(tasks=("facts",), suite="chat"))

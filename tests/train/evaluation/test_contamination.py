"""Which records of an evaluation a model was trained on."""

import json
import logging
import random

import pytest
from helpers import rl_runs
from helpers.core_bundles import mixed_tasks, write_bundle
from helpers.preference_runs import config_of, write_pairs
from helpers.small_runs import small_run, write_conversations, write_whole

from hotlap.train.config import LoopConfig, SFTConfig
from hotlap.train.data.conversations import conversations_of
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.tasks.built_in import TASKS, built_in
from hotlap.train.dpo import optimize_preferences
from hotlap.train.evaluation import contamination, questions
from hotlap.train.evaluation.command import evaluate_model
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.contamination import overlaps
from hotlap.train.evaluation.core_bundle import read_bundle
from hotlap.train.pretrain import pretrain
from hotlap.train.rl import reinforce
from hotlap.train.sft import fine_tune

LONG = "the quick brown fox jumps over the lazy dog near the old stone bridge at noon"  # 16 words
GENERATOR = random.Random(0)


def noise(count: int = 40) -> str:
    return " ".join("".join(GENERATOR.choices("abcdefgh", k=6)) for _ in range(count))


def found(records: list[str], texts: list[str]) -> list[str]:
    return overlaps({"task": records}, texts)["task"].examples


def test_a_long_record_is_found_by_thirteen_of_its_words_and_not_by_twelve():
    words = LONG.split()
    assert found([LONG], [noise(), f"{noise()} {' '.join(words[2:15])} {noise()}"]) == [LONG]
    assert found([LONG], [f"{noise()} {' '.join(words[2:14])} {noise()}"]) == []


def test_words_of_two_texts_are_not_in_a_row():
    words = LONG.split()
    assert found([LONG], [" ".join(words[:8]), " ".join(words[8:])]) == []


def test_a_short_record_is_found_where_it_is_a_whole_message():
    assert found(["What does len do?"], [noise(), "what does\nLEN do"]) == ["What does len do?"]
    assert found(["What does len do?"], ["Tell me: what does len do?"]) == []


def test_case_spaces_and_punctuation_do_not_matter():
    assert found([LONG], [LONG.upper().replace(" ", ",  ")]) == [LONG]


@pytest.mark.parametrize("text", ["12 + 3", "12+3"])
def test_other_sums_of_the_same_numbers_are_other_records(text):
    assert found([text], ["12 - 3", "12-3", "12 * 3"]) == [] and found([text], ["12 + 3"]) == [text]


def test_records_without_words_are_compared_too():
    assert found(["[ ( )"], [". . .", "", "[ ( ) ]"]) == [] and found(["[ ( )"], ["[ ( )"]) == ["[ ( )"]


def test_how_a_task_asks_is_not_taken_for_a_record():
    records = [f"{LONG} {noise(2)}" for _ in range(40)]
    assert found(records, [f"{LONG} {noise(2)}"]) == []
    assert found(records, [f"{LONG} {noise(2)}", records[7]]) == [records[7]]


def test_each_task_has_its_own_count_whatever_the_order_and_number_of_texts(monkeypatch):
    records = {"one": [noise() for _ in range(30)], "two": [noise() for _ in range(30)], "none": []}
    texts = [noise() for _ in range(200)] + records["one"][:3] + records["two"][:1] + records["one"][:3]
    GENERATOR.shuffle(texts)
    monkeypatch.setattr(contamination, "WORDS_AT_ONCE", 500)
    counts = {task: overlap.count for task, overlap in overlaps(records, iter(texts)).items()}
    assert counts == {"one": 3, "two": 1, "none": 0}


def test_held_out_questions_of_the_built_in_tasks_are_not_in_their_training_conversations():
    records = {task: [text for text, _ in examples()] for task, examples in questions.TASKS.items()}
    trained = [m["content"] for talk in built_in([*TASKS], 0) for m in talk]
    assert {task: overlap.count for task, overlap in overlaps(records, trained).items()} == dict.fromkeys(
        records, 0
    )
    planted = overlaps(records, [*trained, records["facts"][5], records["refusals"][3]])
    assert planted["facts"].examples == [records["facts"][5]] and planted["refusals"].count == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model and one that is fine-tuned on its answers."""
    folder = tmp_path_factory.mktemp("runs")
    base = small_run(folder, loop=LoopConfig(1))
    pretrain(base)
    data = write_conversations(folder / "talks.jsonl")
    fine_tune(SFTConfig(folder / "sft", batch_rows=4, base=base.out, data=(str(data),), loop=LoopConfig(1)))
    return folder


def test_scores_say_how_many_questions_were_trained_on(runs, monkeypatch, caplog):
    asked = [("square  of 3.", "is 9."), ("square of 4", "is 16."), ("square of 400", "is 160000.")]
    monkeypatch.setitem(questions.TASKS, "facts", lambda: asked)
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 2)
    out = runs / "scores.json"
    evaluate_model(EvalConfig(runs / "sft", ("facts",), out=out))
    assert json.loads(out.read_text())["scores"]["facts"]["in_training"] == 2
    assert "facts: the model was fine-tuned on 2 of its 3 records, such as 'square  of 3.'" in caplog.text


def test_conversations_that_are_gone_are_named_and_nothing_is_counted(runs, monkeypatch, caplog):
    monkeypatch.setitem(questions.TASKS, "facts", lambda: [("square of 3", "is 9.")])
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 2)
    data = runs / "talks.jsonl"
    text = data.read_text()
    data.unlink()
    scores = evaluate_model(EvalConfig(runs / "sft", ("facts",)))["scores"]
    data.write_text(text)
    assert "in_training" not in scores["facts"] and f"no conversations at {data}" in caplog.text


def test_a_base_that_is_gone_is_named_and_the_model_s_own_conversations_are_compared(runs, caplog):
    (runs / "run").rename(runs / "elsewhere")
    texts = list(contamination.fine_tuning_texts(contamination.model_folder(runs / "sft")))
    (runs / "elsewhere").rename(runs / "run")
    assert "square of 3" in texts and f"{runs / 'run'} is not here" in caplog.text


def test_core_s_records_are_their_texts_with_the_right_answers(tmp_path):
    tasks = read_bundle(write_bundle(tmp_path, mixed_tasks(count=3)))
    scores = {"core": {"tasks": {task.label: {"n": 3} for task in tasks}}}
    marked, records = contamination.scored_records(scores, [], tasks)
    for task in tasks:
        assert marked[task.label] is scores["core"]["tasks"][task.label] and len(records[task.label]) == 3


def test_a_base_model_s_scores_are_not_marked(runs, caplog):
    scores = {"facts": {}}
    with caplog.at_level(logging.INFO, "hotlap"):
        contamination.mark_seen(scores, {"facts": ["x"]}, contamination.model_folder(runs / "run"))
    assert scores == {"facts": {}} and not caplog.text


def test_pairs_are_compared_and_the_conversations_of_their_base(runs, tmp_path):
    made = write_pairs(tmp_path / "pairs.jsonl", 30)
    config = config_of(tmp_path, "dpo", runs / "sft", data=(str(made),), loop=LoopConfig(1))
    optimize_preferences(config)
    texts = set(contamination.fine_tuning_texts(contamination.model_folder(config.out)))
    assert {"square of 29", "is 841.", "so 29, on."} <= texts, "prompts and both answers"
    assert texts > {
        m for talk in conversations_of(parts_of(str(runs / "talks.jsonl")), 0) for m in texts_of(talk)
    }


def test_prompts_are_compared_and_the_conversations_of_their_base(runs, tmp_path):
    prompts = {f"of square {i}" for i in range(40)}
    asked = write_whole(tmp_path / "asked.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    config = rl_runs.config_of(tmp_path, "rl", runs / "sft", data=(str(asked),), loop=LoopConfig(1))
    reinforce(config)
    texts = set(contamination.fine_tuning_texts(contamination.model_folder(config.out)))
    assert 30 < len(prompts & texts) < 40, "those that it was trained on"
    assert texts > {
        m for talk in conversations_of(parts_of(str(runs / "talks.jsonl")), 0) for m in texts_of(talk)
    }


def texts_of(talk) -> list[str]:
    return [message["content"] for message in talk.messages]

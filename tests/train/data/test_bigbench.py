"""Conversations out of BIG-bench's archive."""

import json
import logging

import pytest
from helpers.package_server import serving, tar_archive

from hotlap.common.errors import DataError
from hotlap.train.data import bigbench
from hotlap.train.data.conversations import conversation_plans, conversations_of, download_conversations
from hotlap.train.data.mixtures import parts_of

PARTS = parts_of("bigbench")
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"
FOLDER = TASKS + "natural_instructions/"
PREFIX = "Definition: At length, with a Prompt: inside. Prompt: Answer the question."
CHAT = [
    ("a", 'agent_A: "Hi"', '"Hello "'),
    ("a", 'agent_B: "Hi" agent_A: "Hello "', '"She said "no" to me"'),
    ("a", 'agent_A: "Hi" agent_B: "Hello " agent_A: "She said "no" to me"', '"Bye"'),
    ("b", 'agent_A: "Dogs?"', '"Cats"'),
    ("b", 'agent_B: "Dogs?" agent_A: "Cats"', '"Fish"'),
]


def instructions(*examples: tuple[str, str]) -> str:
    rows = [{"input": text, "target": [answer, "another answer"]} for text, answer in examples]
    return json.dumps({"task_prefix": PREFIX, "examples": rows})


def members() -> dict[str, str]:
    rows = [{"comment": name, "input": text, "target": target} for name, text, target in CHAT]
    asked = ("Sentence: It rains. \nQuestion: Is it wet?.", "Yes.")
    return {
        "bigbench-1.0.0/setup.py": "raise SystemExit('this was run')",
        f"{FOLDER}task.json": "{}",
        f"{FOLDER}subtask002_quoref_answers/task.json": instructions(
            asked, ("Who?", ""), ("Why?", "I ca n't say")
        ),
        f"{FOLDER}subtask033_winogrande_answers/task.json": instructions(
            ("Who _?", "He."), ("What _?", "It.")
        ),
        f"{FOLDER}subtask042_qasc_incorrect_option_generation/task.json": instructions(("What?", "Coal.")),
        f"{TASKS}topical_chat/task.json": json.dumps({"examples": rows}),
        f"{TASKS}other/task.json": json.dumps({"examples": rows}),
        f"elsewhere/{TASKS}topical_chat/task.json": json.dumps({"examples": rows}),
    }


@pytest.fixture
def index(tmp_path, monkeypatch):
    with serving(bigbench, tar_archive(members()), monkeypatch, tmp_path) as server:
        yield server


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_instructions_and_whole_conversations_are_taken_and_the_others_counted(index, caplog):
    assert [*conversation_plans(PARTS)[0].missing] == [bigbench.ARCHIVE.name]
    with caplog.at_level(logging.INFO, "hotlap"):
        download_conversations(PARTS)
    found = list(conversations_of(PARTS, seed=0))
    assert [c.messages for c in found] == [
        talk("Answer the question.\n\nSentence: It rains.\nQuestion: Is it wet?", "Yes."),
        talk("Hi", "Hello", 'She said "no" to me', "Bye"),
        talk("Cats", "Fish"),
    ]
    assert [c.place for c in found] == ["quoref_answers 1", "topical_chat 1", "topical_chat 2"]
    assert {c.split for c in found} == {None}
    for count in (
        "3 conversations", "1 without an answer", "1 whose answer is split into tokens",
        "2 of tasks that evaluations use", "1 of tasks that ask for wrong answers",
    ):  # fmt: skip
        assert count in caplog.text


def test_the_archive_is_read_once(index):
    download_conversations(PARTS)
    first = list(conversations_of(PARTS, seed=0))
    bigbench.ARCHIVE.path.unlink()
    index.sent = b"gone"
    download_conversations(PARTS)
    assert list(conversations_of(PARTS, seed=0)) == first and not conversation_plans(PARTS)[0].missing


def test_a_spoilt_cache_is_refused_by_name(index):
    download_conversations(PARTS)
    path = bigbench.cache_path()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{path} is damaged .*; delete it"):
        list(conversations_of(PARTS, seed=0))


def test_reading_does_not_download(index):
    with pytest.raises(FileNotFoundError, match="hotlap sft --data bigbench"):
        list(conversations_of(PARTS, seed=0))


def test_a_task_larger_than_any_is_refused(index, monkeypatch):
    monkeypatch.setattr(bigbench, "LARGEST_TASK", 100)
    with pytest.raises(DataError, match=r"task\.json has .* bytes; the limit is 100"):
        download_conversations(PARTS)
    assert not bigbench.cache_path().exists()

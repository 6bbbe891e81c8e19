"""The data sets that a mixture names: built-in, on the hub, or files."""

import json

import pytest
from helpers.small_runs import conversation

from hotlap.train.data.conversations import (
    check_parts,
    conversation_plans,
    conversations_of,
    download_conversations,
)
from hotlap.train.data.datasets import GSM8K, MMLU, SMOLTALK
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.tasks import identity


def messages_of(*data: str) -> list[list[dict]]:
    return [found.messages for found in conversations_of(parts_of(data), seed=0)]


def write_talk(path, *talks) -> None:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def test_a_name_is_a_file_of_the_folder_the_home_folder_or_a_built_in_one(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    talk = conversation("a", "b")
    write_talk(tmp_path / "greetings", talk)
    for name in ("./greetings", "~/greetings"):
        check_parts(parts_of(name))
        assert messages_of(name) == [talk]
    assert not caplog.text
    check_parts(parts_of(["greetings", "./greetings"]))
    assert talk not in messages_of("greetings")
    assert "greetings: hotlap's own data set, not your file, which is ./greetings" in caplog.text


def test_a_part_that_is_nothing_or_there_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_talk(tmp_path / "a.jsonl", conversation("a", "b"))
    for name, match in {
        "smaltalk": "no conversations at smaltalk; did you mean smoltalk",
        "none.jsonl": "no conversations at none.jsonl; name a .jsonl or .parquet file, or tasks, facts",
        "none.jsonl:2": "no conversations at none.jsonl; name",
    }.items():
        with pytest.raises(FileNotFoundError, match=match):
            check_parts(parts_of(["tasks", name]))
    for again, match in {
        "a.jsonl:2": r"a.jsonl is there twice; name it once, with a weight, such as a.jsonl:2",
        "./a.jsonl:2": r"./a.jsonl is a.jsonl under another name; name it once",
        "tasks:2": r"tasks is there twice",
    }.items():
        with pytest.raises(ValueError, match=match):
            check_parts(parts_of(["tasks", "a.jsonl", again]))
    with pytest.raises(ValueError, match="the name of the data is empty"):
        check_parts(parts_of(" "))


def test_the_parts_of_a_mixture_come_one_after_the_other_with_their_number(tmp_path):
    talks = {name: [conversation(f"{name} {i}", "b") for i in range(3)] for name in "abc"}
    for name, found in talks.items():
        write_talk(tmp_path / name, *found)
    parts = parts_of([f"{tmp_path}/a", f"{tmp_path}/b:2.5", f"{tmp_path}/c:0.5"])
    found = list(conversations_of(parts, seed=0))
    assert [c.messages for c in found] == [*talks["a"], *talks["b"], *talks["c"]]
    assert [c.part for c in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_each_built_in_task_has_a_name(monkeypatch):
    monkeypatch.setattr("hotlap.train.data.tasks.built_in.vocabulary", lambda: ["alpha", "beta", "gamma"])
    asked = {name: {m["content"] for talk in messages_of(name) for m in talk if m["role"] == "user"}
             for name in ("facts", "arithmetic", "spelling", "greetings", "refusals")}  # fmt: skip
    assert {q for questions in identity.ANSWERS.values() for q in questions} <= asked["greetings"]
    assert "What does len do?" in asked["facts"] and any("alpha" in q for q in asked["spelling"])
    together = {m["content"] for talk in messages_of("tasks") for m in talk if m["role"] == "user"}
    assert together == set().union(*asked.values())


@pytest.fixture
def hub_with_all(hub_server, tmp_path, monkeypatch):
    """The hub with small files of all conversations in it, and an empty cache."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("huggingface_hub")
    from helpers.hub_data import add_conversations

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_conversations(hub_server, tmp_path, monkeypatch)
    return hub_server


def test_what_is_on_the_hub_is_downloaded_once_and_no_more_of_it_than_is_trained_on(hub_with_all, tmp_path):
    parts = parts_of(["smoltalk", "gsm8k:4", "tasks", "mmlu:3"])
    plans = conversation_plans(parts)
    assert [plan.folder.name for plan in plans] == ["smoltalk", "gsm8k", "mmlu"]
    assert [len(plan.missing) for plan in plans] == [5, 1, 2]
    download_conversations(parts)
    download_conversations(parts)
    names = [*SMOLTALK.names(4), *GSM8K.files["train"], *MMLU.names(1)]
    assert hub_with_all.fetched() == dict.fromkeys(names, 1)
    assert not any(plan.missing for plan in conversation_plans(parts))
    assert not list((tmp_path / "cache").rglob(".hub"))


def test_data_sets_keep_their_own_splits_and_what_cannot_be_learned_is_counted(hub_with_all, caplog):
    from helpers.hub_data import smoltalk_conversations

    caplog.set_level("INFO")
    parts = parts_of(["smoltalk", "mmlu", "gsm8k"])
    download_conversations(parts)
    found = list(conversations_of(parts, seed=0))
    names = SMOLTALK.names(4)
    for split, files in (("train", names[1:]), ("validation", names[:1])):
        wanted = [talk for name in files for talk in smoltalk_conversations(name)[:-1]]
        assert [c.messages for c in found if c.split == split and c.part == 0] == wanted
    assert caplog.text.count("skipped 1 of 21 conversations, the first: ") == 5
    assert "parquet:21: the conversation does not end with the assistant's answer" in caplog.text
    assert {(c.part, c.split) for c in found} == {
        (0, "train"), (0, "validation"), (1, "train"), (1, "validation"), (2, None)
    }  # fmt: skip
    assert {c.messages[-1]["content"] for c in found if c.part == 1} <= set("ABCD")
    assert all("####" in c.messages[-1]["content"] for c in found if c.part == 2)

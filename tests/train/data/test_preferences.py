"""Preference pairs in files, and on the hub."""

import json
from pathlib import Path

import pytest
from helpers.small_runs import conversation

from hotlap.common.errors import DataError
from hotlap.model.messages import TOOL
from hotlap.serve.saved_conversations import Answer, Conversation, Turn, pairs
from hotlap.train.data.datasets import ULTRAFEEDBACK
from hotlap.train.data.preferences import (
    Pair,
    check_data,
    download_pairs,
    pairs_of,
    read_pairs,
)

USER = {"role": "user", "content": "2 and 3?"}
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("five", "six"))
TALK = conversation("a", "b")
PAIR = Pair("", [USER], [RIGHT], [WRONG])


def read(path: Path, *records: object) -> list[Pair]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [pair._replace(place="") for pair in read_pairs(path)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 and 3?", "chosen": "five", "rejected": "six"},
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": "2 and 3?", "chosen": [RIGHT], "rejected": "six"},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": "2 and 3? ", "chosen": [USER, RIGHT], "rejected": [USER, WRONG], "score_chosen": 8.0},
        {"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    ],
    ids=["texts", "messages", "both", "implicit prompt", "UltraFeedback", "prompt and whole conversations"],
)
def test_every_form_of_a_pair_is_read_alike(record, tmp_path):
    assert read(tmp_path / "a.jsonl", record) == [PAIR]


def test_a_history_and_calls_of_the_tool_are_kept_apart_from_the_answer(tmp_path):
    call = {"type": "function", "function": {"name": TOOL, "arguments": {"expression": "2+3"}}}
    before = [{"role": "system", "content": "Be brief."}, *conversation("Hello", "Hi."), USER]
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        RIGHT,
    ]
    whole = {"chosen": [*before, *answer], "rejected": [*before, WRONG]}
    split = {"prompt": before, "chosen": answer, "rejected": [WRONG]}
    wanted = Pair("", before, answer, [WRONG])
    assert read(tmp_path / "a.jsonl", whole, split) == [wanted, wanted]


def test_an_answer_that_is_there_twice_leaves_the_prompt_as_it_is(tmp_path):
    same = {"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]}
    assert read(tmp_path / "a.jsonl", same) == [Pair("", [USER], [RIGHT], [RIGHT])]


def test_ratings_of_the_web_page_are_pairs(tmp_path):
    answers = [Answer([message], "m", "", 1, 0.1, 0.2, liked=message is RIGHT) for message in (RIGHT, WRONG)]
    rated = pairs(Conversation(turns=[Turn(USER["content"], answers)]))
    assert read(tmp_path / "a.jsonl", *rated) == [PAIR]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "no 'rejected', but an object with the keys 'prompt', 'chosen'"),
        ({"prompt": "a", "rejected": "b"}, "no 'chosen'"),
        ({"messages": conversation("a", "b")}, "no 'chosen'.*one answer alone is for `hotlap sft`"),
        ({"chosen": "b", "rejected": "c"}, "no 'prompt', but .*; it must be"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be a string or a list of messages"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen': message 1: the assistant says nothing"),
        ({"chosen": TALK, "rejected": [USER, WRONG]}, "'chosen' and 'rejected' differ in message 0"),
        ({"prompt": "x", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "'prompt' is not how"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "'system' would be lost"),
        ({"prompt": "a", "chosen": [RIGHT, USER], "rejected": "c"}, "'chosen' does not end with"),
        ({"prompt": TALK, "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "'prompt' is not how"),
        ({"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [USER]}, "'rejected' has no answer after"),
        ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "half of a character"),
        ([1], "a JSON array; each line must be"),
        ({}, "no 'chosen', but an empty object"),
    ],
)  # fmt: skip
def test_a_pair_that_is_none_is_named_with_its_line(record, said, tmp_path):
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{said}"):
        read(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, record)


def test_a_file_without_pairs_and_ignored_keys_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(DataError, match="holds no pair"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no pairs at .*`ultrafeedback`, or `tasks`"):
        list(read_pairs(tmp_path / "none.jsonl"))
    read(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "score": 1})
    assert (
        "ignored keys beside `prompt`, `chosen`, `rejected`, with the lines that have them: 'score' (1)"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (("tasks:2",), "has a weight, which only `hotlap sft` knows; write tasks"),
        (("mine.jsonl:0.5",), r"has a weight, .*; write mine\.jsonl"),
        (("gsm8k",), "gsm8k are conversations, for `hotlap sft`; name a"),
        (("ultrafedback",), "no pairs at ultrafedback; name a .jsonl or .parquet file, `ultrafeedback`"),
        (("tasks", "tasks"), "tasks is there twice"),
        (("mine.jsonl", "./mine.jsonl"), r"mine\.jsonl is there twice; name it once \(--epochs 2"),
    ],
)
def test_names_that_are_no_pairs_say_what_to_name(data, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_data(data)
    check_data(("tasks", "ultrafeedback", "mine.jsonl"))


def test_ultrafeedback_is_downloaded_once_with_its_own_splits(hub_server, tmp_path, monkeypatch, caplog):
    pytest.importorskip("pyarrow")
    pytest.importorskip("huggingface_hub")
    from helpers.hub_data import add_ultrafeedback

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_ultrafeedback(hub_server, tmp_path)
    caplog.set_level("INFO")
    for _ in range(2):
        download_pairs(("tasks", "ultrafeedback"))
    assert hub_server.fetched() == dict.fromkeys(ULTRAFEEDBACK.names(1), 1)
    assert not (ULTRAFEEDBACK.folder / ".hub").exists()
    found = list(pairs_of("ultrafeedback"))
    assert [pair.split for pair in found] == ["train"] * 3 + ["validation"] * 3
    assert found[1].prompt == [{"role": "user", "content": "1 of train?"}]
    assert [side[0]["content"] for side in found[1][2:4]] == ["good", "bad"]
    assert caplog.text.count("skipped 1 of 4 pairs, the first: ") == 2

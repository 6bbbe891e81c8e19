"""What reinforcement learning asks: by name, from files, and what is never trained on."""

import pytest
from helpers.hub_data import add_conversations, add_mbpp, mbpp_rows
from helpers.prompts import write_prompts

from hotlap.common.errors import DataError
from hotlap.train.data.prompts import (
    SOURCES,
    check_prompt_data,
    download_prompts,
    prompts_of,
    rewards_of,
    source_of,
    tools_of,
)
from hotlap.train.data.tasks import arithmetic, spelling
from hotlap.train.rewards import verifiers
from hotlap.train.rewards.worker import load

REWARD = "helpers.reward_functions:length"
MADE = ("spelling", "sums", "arithmetic")
USER = {"role": "user", "content": "2 and 3?"}


def texts(*data: str, split: str = "train", seed: int = 0) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts_of(data, split, seed)]


@pytest.mark.parametrize("name", MADE)
def test_prompts_are_the_same_for_a_seed_and_held_out_ones_for_any(name):
    assert prompts_of((name,), "train", 1) == prompts_of((name,), "train", 1)
    assert texts(name, seed=1) != texts(name, seed=2)
    assert texts(name, split="validation", seed=1) == texts(name, split="validation", seed=2)


@pytest.mark.parametrize("name", MADE)
def test_what_validates_is_not_trained_on(name):
    assert not set(texts(name)) & set(texts(name, split="validation"))


def test_held_out_words_and_numbers_are_in_no_prompt_to_train_on():
    words = {prompt.record["answer"].replace(" ", "") for prompt in prompts_of(("spelling",), "train", 0)}
    assert words and not any(map(spelling.is_held_out, words))
    for name in ("sums", "arithmetic"):
        for text in texts(name):
            a, b = numbers_in(text)
            assert not arithmetic.is_held_out(a, b), text


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in "".join(c if c.isdigit() else " " for c in text).split()]


def test_the_right_answers_of_built_in_prompts_get_the_whole_reward():
    for name, reward in (("spelling", "spelling"), ("sums", "total"), ("arithmetic", "result")):
        for prompt in prompts_of((name,), "validation", 0):
            assert getattr(verifiers, reward)(prompt.record["answer"], prompt.record) == 1.0
            assert prompt.source == name and prompt.place.startswith(f"{name}:")


def test_sums_are_asked_without_the_calculator_and_arithmetic_with_it():
    own = ("python",)
    assert tools_of("sums", own) == tools_of("spelling", own) == tools_of("mbpp", own) == ()
    assert tools_of("arithmetic", own) == tools_of("gsm8k", own) == ("calculator",)
    assert tools_of("a.jsonl", own) == own
    assert not set(texts("sums")) & set(texts("arithmetic"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_a_reward_that_is_a_function_of_an_answer_and_a_record(name):
    load(rewards_of((name,), None)[name])


def test_the_given_reward_is_that_of_all_data():
    data = ("spelling", "a.jsonl")
    assert rewards_of(data, REWARD) == dict.fromkeys(data, REWARD)
    assert rewards_of(("sums", "gsm8k"), None) == {
        "sums": "hotlap.train.rewards.verifiers:total",
        "gsm8k": "hotlap.train.rewards.verifiers:solution",
    }


def test_word_problems_train_on_one_split_of_the_hub_and_validate_on_another(
    hub_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    add_conversations(hub_server, tmp_path, monkeypatch)
    download_prompts(("gsm8k", "spelling"))
    assert hub_server.fetched() == {name: 1 for split in ("train", "test") for name in gsm8k_files(split)}
    (first, *rest) = prompts_of(("gsm8k",), "validation", 0)
    assert first.messages == [{"role": "user", "content": "0 and 0 apples?"}]
    assert first.record == {"answer": "0"} and len(rest) == 19


def gsm8k_files(split: str) -> tuple[str, ...]:
    return SOURCES["gsm8k"].dataset.files[split]


def test_functions_to_write_come_with_their_tests_and_those_to_test_on_stay_on_the_hub(
    hub_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    add_mbpp(hub_server, monkeypatch)
    download_prompts(("mbpp",))
    assert not any("test" in name for name in hub_server.fetched())
    for split in ("train", "validation"):
        prompts = prompts_of(("mbpp",), split, 0)
        for prompt, row in zip(prompts, mbpp_rows(split), strict=True):
            (message,) = prompt.messages
            assert message["content"].startswith(row["prompt"]) and row["test_list"][0] in message["content"]
            assert row["test_list"][1] not in message["content"]
            assert prompt.record == {"tests": row["test_list"], "imports": row["test_imports"]}


def test_a_file_of_prompts_is_read_in_every_form_of_theirs(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    history = [USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "and 1?"}]
    records = [
        {"prompt": "2 and 3?", "answer": "5"},
        {"prompt": [system, USER], "most": 3},
        {"prompt": history, "answer": None},
    ]
    path = str(write_prompts(tmp_path / "a.jsonl", *records))
    found = sorted(
        prompts_of((path,), "train", 0) + prompts_of((path,), "validation", 0), key=lambda p: p.place
    )
    assert [prompt.messages for prompt in found] == [[USER], [system, USER], history]
    assert [prompt.record for prompt in found] == records
    assert [prompt.place for prompt in found] == [f"{path}:{i}" for i in (1, 2, 3)]


def test_a_parquet_file_is_read_as_lines_of_json_are(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = [{"prompt": f"{i}?", "answer": i, "more": {"a": [i]}} for i in range(60)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    write_prompts(tmp_path / "a.jsonl", *records)
    for split in ("train", "validation"):
        read = [
            [(p.messages, p.record) for p in prompts_of((str(tmp_path / name),), split, 0)]
            for name in ("a.parquet", "a.jsonl")
        ]
        assert read[0] == read[1] and read[0]


def test_prompts_of_a_file_are_split_by_their_text(tmp_path):
    records = [{"prompt": f"What is {i % 200}?", "answer": i} for i in range(400)]
    path = str(write_prompts(tmp_path / "a.jsonl", *records))
    train, validation = (prompts_of((path,), split, 0) for split in ("train", "validation"))
    assert len(train) + len(validation) == 400
    assert 0 < len(validation) <= 40
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in validation}
    (tmp_path / "b.jsonl").write_text("".join(reversed((tmp_path / "a.jsonl").read_text().splitlines(True))))
    again = prompts_of((str(tmp_path / "b.jsonl"),), "validation", 0)
    assert sorted(p.record["answer"] for p in again) == sorted(p.record["answer"] for p in validation)


def test_a_single_prompt_is_both_splits(tmp_path):
    path = str(write_prompts(tmp_path / "a.jsonl", {"prompt": "a"}))
    assert prompts_of((path,), "train", 0) == prompts_of((path,), "validation", 0) != []


def test_held_out_questions_of_one_name_are_not_trained_on_under_another(tmp_path, caplog):
    caplog.set_level("INFO")
    held_out = texts("sums", split="validation")[:5]
    path = write_prompts(tmp_path / "a.jsonl", *({"prompt": text} for text in [*held_out, "another", "more"]))
    found = prompts_of(("sums", str(path)), "train", 0)
    assert not {prompt.messages[0]["content"] for prompt in found} & set(held_out)
    assert "prompts to train on that also validate" in caplog.text


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "JSON over several lines"),
        ("3", r"a\.jsonl:2: 3; each line must be"),
        ('[{"role": "user", "content": "a"}]', "a list of messages"),
        ('{"answer": "5"}', r"a\.jsonl:2: no 'prompt'"),
        ('{"question": "a"}', "rename 'question' to 'prompt'"),
        ('{"promt": "a"}', "rename 'promt' to 'prompt'"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "write the messages before the answer as `prompt`",
        ),
        ('{"prompt": ""}', "the user says nothing"),
        ('{"prompt": 3}', "'prompt' must be a string or a list of messages, not 3"),
        ('{"prompt": []}', "'prompt' must be a string or a list"),
        ('{"prompt": [{"role": "system", "content": "a"}]}', "ends with a message from 'system'"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "ends with a message from 'assistant'",
        ),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "message 0: from 'assistant' at the start"),
        ('{"prompt": "a", "system": "b"}', "'system' would be lost"),
        ('{"prompt": "\\ud83d"}', "half of a character"),
        ('{"prompt": "a", "prompt": "b"}', "prompt"),
    ],
)
def test_a_bad_record_is_named_by_its_line_before_anything_is_loaded(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as raised:
        check_prompt_data((str(path),), REWARD)
    assert str(raised.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "data, error, message",
    [
        ((), ValueError, "no data is named; name a .jsonl"),
        (("speling",), FileNotFoundError, "no prompts at speling; did you mean spelling?"),
        (("none.jsonl",), FileNotFoundError, "no prompts at none.jsonl; name a .jsonl"),
        (("sums", "sums"), ValueError, "sums is there twice"),
        (("sums:3",), ValueError, "has a weight, which only `hotlap sft` knows; write sums"),
        (("folder",), DataError, "folder is a folder; name a file"),
        (("a.jsonl",), ValueError, "a.jsonl is a file, which needs --reward package.module:function"),
        (("a.jsonl", "./a.jsonl"), ValueError, "./a.jsonl is there twice"),
        (("empty.jsonl",), ValueError, "needs --reward"),
        ((" ",), ValueError, "the name of the data is empty"),
    ],
)
def test_what_is_no_data_is_refused(data, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "a.jsonl", {"prompt": "a"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(error, match=message):
        check_prompt_data(data, None)


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        check_prompt_data((str(tmp_path / "a.jsonl"),), REWARD)


def test_built_in_names_go_before_files(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "sums", {"prompt": "a"})
    check_prompt_data(("sums",), None)
    assert "not your file, which is ./sums" in caplog.text
    assert source_of("./sums") is None

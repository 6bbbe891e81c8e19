"""Conversations as training data."""

import itertools
import json
import weakref

import numpy as np
import pytest
import torch
from helpers.small_runs import conversation, special_text
from helpers.tools import tiny_config

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.conversation import TOOL, render
from hotlap.train.data.conversations import (
    accepted,
    built_in,
    conversation_digests,
    conversation_rows,
    conversations_of,
    conversations_plan,
    download_conversations,
    labelled_conversations,
    read_conversations,
    rendered,
    smoltalk_folder,
)
from hotlap.train.data.datasets import SMOLTALK
from hotlap.train.data.tasks import arithmetic, facts, identity, spelling
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all
from hotlap.train.sft import SFTConfig, epoch_steps

WORDS = [a + b + c for a in "abcdefghij" for b in "klmnop" for c in "qrstuv"]


def with_a_sum() -> list[dict]:
    call = {"type": "function", "function": {"name": TOOL, "arguments": {"expression": "2+3"}}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 and 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]


def test_only_what_the_assistant_says_is_a_target(tiny_tokenizer):
    talks = [
        conversation("Hello there", "Hi."),
        with_a_sum(),
        conversation("a", "b") + conversation("c", "dog"),
    ]
    rows = conversation_rows(talks, tiny_tokenizer, T=64, seed=0, shuffle=False)
    batch = rows.batch(0, rows.epoch_rows())
    targets = batch.targets[batch.targets != IGNORE].tolist()
    special, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    end = [special["<|assistant_end|>"]]
    said = [
        encode("Hi.") + end,
        [special["<|tool_start|>"], *encode("2+3"), special["<|tool_end|>"], *encode("five"), *end],
        encode("b") + end + encode("dog") + end,
    ]
    assert sorted(targets) == sorted(itertools.chain(*said))


def test_what_is_longer_than_a_row_is_dropped_and_counted(tiny_tokenizer, caplog):
    talks = [conversation("Hi", "Hi."), conversation("long " * 50, "Hi.")]
    rows = conversation_rows(talks, tiny_tokenizer, T=64, seed=0, shuffle=False)
    assert "1 of 2 conversations are longer than 64 tokens; skipped" in caplog.text
    assert rows.epoch_rows() == 1 and rows.batch(0, 1).weight == len(tiny_tokenizer.encode("Hi.")) + 1
    with pytest.raises(DataError, match="no conversation fits the model's context of 64"):
        conversation_rows(talks[1:], tiny_tokenizer, 64, 0, False)


def test_a_conversation_of_just_a_row_fits(tiny_tokenizer):
    talk = conversation("Hi", "Hi.")
    length = len(render(talk, tiny_tokenizer)[0])
    assert conversation_rows([talk], tiny_tokenizer, length, 0, False).epoch_rows() == 1
    with pytest.raises(DataError):
        conversation_rows([talk], tiny_tokenizer, length - 1, 0, False)


def test_text_that_spells_special_tokens_stays_text(tiny_tokenizer, caplog):
    talks = [conversation(special_text(), special_text()), conversation("a", "b")]
    ids, _ = render(talks[0], tiny_tokenizer)
    assert sum(token >= tiny_tokenizer.text_size for token in ids) == 5  # bos, two marks a turn
    rows = conversation_rows(talks, tiny_tokenizer, 512, 0, False)
    inputs = rows.batch(0, 1).inputs
    assert int((inputs >= tiny_tokenizer.text_size).sum()) == 10
    assert "1 conversations contain the text of a special token" in caplog.text


def test_packed_conversations_do_not_see_each_other(tiny_tokenizer, random_model):
    talks = [conversation("Hello there", "Hi."), conversation("dog", "fox")]
    model = random_model(tiny_config())

    def losses(talks):
        rows = conversation_rows(talks, tiny_tokenizer, 64, 0, False)
        total = torch.zeros(())
        for i in range(rows.epoch_rows()):
            batch = rows.batch(i, 1)
            total += model(batch.inputs, batch.targets, document_start=batch.document_start).detach()
        return total

    together = losses(talks)
    torch.testing.assert_close(together, losses(talks[:1]) + losses(talks[1:]), rtol=1e-5, atol=1e-5)


GOOD = json.dumps({"messages": conversation("a", "b")})
BAD_LINES = {
    '{"messages": [': "not JSON",
    '{"prompt": "a"}': 'needs a "messages" list',
    "[]": 'needs a "messages" list',
    '{"messages": []}': "at least one message",
    '{"messages": "hello"}': "must be a list",
    json.dumps({"messages": conversation("a", "b")[:1]}): "does not end with the assistant",
    json.dumps({"messages": conversation("a", "b")[::-1]}): "message 0 is from 'assistant'",
    json.dumps({"messages": conversation("a", "b")[:1] * 2}): "message 1 is from 'user'",
    json.dumps({"messages": conversation("a", " ")}): "message 1: the assistant says nothing",
    json.dumps({"messages": conversation("a", 3)}): "message 1: `content` must be a string",
    json.dumps({"messages": [{"role": "human", "content": "a"}]}): "message 0 needs a `role`",
    json.dumps({"messages": with_a_sum()[:3]}): "does not end with the assistant's answer",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"talks\.jsonl:3: .*{BAD_LINES[line]}"):
        list(read_conversations(path))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"talks\.jsonl:2: "):
        list(read_conversations(path))


def test_a_missing_and_an_empty_file_of_conversations_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no conversations at"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no conversation"):
        list(read_conversations(tmp_path / "empty.jsonl"))


def split_conversations(talks: list[list[dict]]) -> tuple[list[list[dict]], list[list[dict]]]:
    labelled = list(labelled_conversations(talks))
    return tuple([talk for label, talk in labelled if label == split] for split in ("train", "validation"))


def test_equal_conversations_are_on_the_same_side():
    talks = [conversation(f"question {i % 300}", "answer") for i in range(900)]
    train, held_out = split_conversations(talks)
    keys = [{json.dumps(t) for t in side} for side in (train, held_out)]
    assert not keys[0] & keys[1] and len(train) + len(held_out) == 900
    assert 0.01 < len(held_out) / 900 < 0.1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_conversations_are_enough_for_both_sides(count):
    for start in range(60):  # whatever their hashes are
        talks = [conversation(f"question {start + i}", "answer") for i in range(count)]
        train, held_out = split_conversations(talks)
        assert train and held_out
        assert sorted(map(str, train + held_out)) == sorted(map(str, talks)) or (
            count == 1 and train == held_out
        )


def test_held_out_questions_about_facts_are_in_no_trained_phrasing():
    assert len(facts.facts()) >= 300
    trained = {talk[0]["content"] for talk in facts.training_conversations()}
    held_out = facts.held_out()
    assert not trained & {question for question, _ in held_out}
    assert not set(facts.PHRASINGS) & set(facts.HELD_OUT_PHRASINGS)
    assert {answer for _, answer in held_out} == {
        talk[1]["content"] for talk in facts.training_conversations()
    }
    assert len({fact.name for fact in facts.facts()}) == len(facts.facts()) == len(held_out)
    assert any(fact.name == "len" and "number of items" in fact.answer for fact in facts.facts())


def test_held_out_sums_are_of_pairs_that_are_never_trained_on():
    def pair(expression):
        a, _, b = expression.split()
        return int(a), int(b)

    talks = arithmetic.training_conversations(3000, seed=0)
    trained = {pair(talk[3]["content"].split(" = ")[0]) for talk in talks}
    held_out = arithmetic.held_out(200)
    assert not trained & {pair(answer.split(" = ")[0]) for _, answer in held_out}
    questions = {talk[0]["content"] for talk in talks}
    assert len(held_out) == 200 and not questions & {question for question, _ in held_out}
    for talk in talks[:50]:
        assert eval(talk[1]["tool_calls"][0]["function"]["arguments"]["expression"]) == int(
            talk[2]["content"]
        )


def test_held_out_words_are_never_trained_on():
    trained = {talk[1]["content"] for talk in spelling.training_conversations(WORDS, 3000, seed=0)}
    held_out = spelling.held_out(WORDS, 100)
    assert held_out and not trained & {answer for _, answer in held_out}
    assert all(question.split()[3] == answer.replace(" ", "") for question, answer in held_out)
    assert spelling.HELD_OUT_PHRASING not in spelling.PHRASINGS


def test_the_built_in_mixture_is_valid_the_same_twice_and_sometimes_of_several_turns(tiny_tokenizer):
    texts = [" ".join(WORDS)]
    mixture = built_in(texts, seed=0)
    assert mixture == built_in(texts, seed=0) != built_in(texts, seed=1)
    turns = [sum(m["role"] == "user" for m in talk) for talk in mixture]
    assert set(turns) == {1, 2, 3}
    asked = {m["content"] for talk in mixture for m in talk if m["role"] == "user"}
    assert {q for questions in identity.ANSWERS.values() for q in questions} <= asked
    for talk in mixture[:300]:
        ids, said = render(talk, tiny_tokenizer)
        assert len(ids) == len(said) and any(said)


def test_texts_that_are_encoded_together_are_what_they_are_alone(tiny_tokenizer, monkeypatch):
    talks = [
        with_a_sum(),
        conversation(special_text(), "é 5"),
        *[conversation(f"{i}", "b") for i in range(9)],
    ]
    talks[0][2]["content"] = None
    monkeypatch.setattr("hotlap.train.data.conversations.CHARACTERS_AT_ONCE", 5)
    found = list(rendered(talks, tiny_tokenizer))
    assert found == [(talk, *render(talk, tiny_tokenizer)) for talk in talks]


def test_rows_take_conversations_one_at_a_time_and_keep_tokens_only(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hotlap.train.data.conversations.CHARACTERS_AT_ONCE", 100)
    alive = weakref.WeakSet()

    class Message(dict):
        __hash__ = object.__hash__

    def talks():
        for i in range(200):
            talk = [Message(message) for message in conversation(f"Question {i}?", "Yes.")]
            alive.update(talk)
            assert len(alive) < 40
            yield talk

    rows = conversation_rows(talks(), tiny_tokenizer, 64, 0, False)
    assert rows.shards[0]().tokens.dtype == np.uint16 and not alive


@pytest.mark.parametrize("stages", [((1.0, 1.0),), ((0.5, 1.0), (1.0, 1.0))])
def test_epochs_are_as_many_passes_and_hardly_more(tiny_tokenizer, stages):
    rows = conversation_rows([conversation("a" * 40, "b")] * 37, tiny_tokenizer, 64, 0, False)
    config = SFTConfig(batch_rows=4, epochs=2, schedule=ScheduleConfig(stages=stages))
    seen = rows_in_all(config.schedule, 4, epoch_steps(config, rows))
    assert rows.epoch_rows() == 37 and 2 * 37 <= seen < 2 * 37 + 8


def test_equal_conversations_have_equal_digests(tiny_tokenizer):
    talks = [conversation("a", "b"), conversation("a", "c"), conversation("a", "b")]
    first, second, third = conversation_digests(conversation_rows(talks, tiny_tokenizer, 64, 0, True))
    assert first == third != second
    alone = conversation_digests(conversation_rows(talks[1:2], tiny_tokenizer, 64, 1, False))
    assert alone == [second]


def test_a_parquet_file_of_messages_is_read_like_lines(tmp_path):
    from helpers.hub_data import write_talks

    pytest.importorskip("pyarrow")
    talks = [conversation(f"{i}", "b") for i in range(20)]
    assert list(read_conversations(write_talks(tmp_path / "a.parquet", talks))) == [
        [{"content": m["content"], "role": m["role"]} for m in talk] for talk in talks
    ]
    path = write_talks(tmp_path / "bad.parquet", [*talks, talks[0][:1]])
    with pytest.raises(DataError, match=r"bad\.parquet:21: the conversation does not end with"):
        list(read_conversations(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged, or not a parquet file"):
        list(read_conversations(path))


def test_a_parquet_file_without_messages_is_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns \['text'\]; it needs `messages`"):
        list(read_conversations(tmp_path / "a.parquet"))


def test_smoltalk_is_downloaded_once_and_mixed_with_the_tasks(hub_server, tmp_path, monkeypatch, caplog):
    pytest.importorskip("pyarrow")
    pytest.importorskip("huggingface_hub")
    from helpers.hub_data import add_smoltalk, smoltalk_conversations

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_smoltalk(hub_server, tmp_path)
    names = SMOLTALK.names(4)
    assert len(conversations_plan("smoltalk").missing) == 5
    download_conversations("smoltalk")
    download_conversations("smoltalk")
    assert hub_server.fetched() == dict.fromkeys(names, 1) and not conversations_plan("smoltalk").missing
    assert not (smoltalk_folder() / ".hub").exists()

    caplog.set_level("INFO")
    tasks = [conversation(f"task {i}", "b") for i in range(100)]
    monkeypatch.setattr("hotlap.train.data.conversations.documentation_tasks", lambda seed: tasks)
    task_sides = dict(zip(("train", "validation"), split_conversations(tasks), strict=True))
    for split, files in (("train", names[1:]), ("validation", names[:1])):
        wanted = [talk for name in files for talk in smoltalk_conversations(name)[:-1]]
        assert list(conversations_of(split, "smoltalk", seed=0)) == wanted + task_sides[split]
    assert caplog.text.count("skipped 1 of 21 conversations, the first: ") == 5
    assert "parquet:21: the conversation does not end with the assistant's answer" in caplog.text


def test_a_public_file_of_which_nothing_is_refused_says_nothing(tmp_path, caplog):
    path = tmp_path / "talks.jsonl"
    path.write_text(GOOD)
    assert len(list(accepted(path))) == 1 and not caplog.text

"""Conversations as training data."""

import itertools
import json
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from helpers.small_runs import conversation, special_text
from helpers.tools import tiny_config

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.conversation import render
from hotlap.model.messages import TOOL
from hotlap.model.tokenizer import train_characters
from hotlap.train.data.conversations import (
    Conversation,
    LeftOut,
    Tokens,
    built_in,
    conversation_digests,
    conversation_rows,
    conversations_of,
    conversations_plan,
    download_conversations,
    held_out,
    rendered,
    smoltalk_folder,
)
from hotlap.train.data.datasets import SMOLTALK
from hotlap.train.data.rows import PackedRows
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


def named(talks: Iterable[list[dict]], split: str | None = None) -> Iterator[Conversation]:
    return (Conversation(f"talk {i}", talk, split) for i, talk in enumerate(talks, 1))


def rows_of(talks, tokenizer, T: int = 64) -> PackedRows:
    """Rows of all these conversations."""
    return conversation_rows(named(talks, "train"), tokenizer, T, seed=0)["train"]


def test_only_what_the_assistant_says_is_a_target(tiny_tokenizer):
    talks = [
        conversation("Hello there", "Hi."),
        with_a_sum(),
        conversation("a", "b") + conversation("c", "dog"),
    ]
    rows = rows_of(talks, tiny_tokenizer, 64)
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


def test_what_cannot_be_used_is_left_out_before_the_split_and_counted_once(tiny_tokenizer, caplog):
    caplog.set_level("INFO")
    talks = [conversation("long " * 500, "Hi."), *[conversation(f"{i}", "b") for i in range(12)]]
    for order in (talks, talks[::-1]):
        caplog.clear()
        rows = conversation_rows(named(order), tiny_tokenizer, 64, 0)
        assert sorted(len(conversation_digests(rows[split])) for split in rows) == [1, 11]
        (record,) = caplog.messages
        place = f"talk {order.index(talks[0]) + 1}"
        assert "left out: 1 of 13 conversations are longer than the model's context of 64 tokens" in record
        assert f"({place}: " in record
    with pytest.raises(DataError, match=r"no conversation fits the model: 1 of 1 .* context of 64 tokens"):
        conversation_rows(named(talks[:1]), tiny_tokenizer, 64, 0)


def test_text_that_cannot_fit_is_not_encoded(tiny_tokenizer, monkeypatch):
    """Where it is very long, that would take much memory, or more stack than a library has."""
    encode_batch = tiny_tokenizer.encode_batch

    def encode(texts: list[str]) -> list[list[int]]:
        assert max(map(len, texts)) < 1_000_000
        return encode_batch(texts)

    monkeypatch.setattr(tiny_tokenizer, "encode_batch", encode)
    rows = rows_of([conversation(" " * 1_000_000, "a"), conversation("a", "b")], tiny_tokenizer)
    assert len(conversation_digests(rows)) == 1


def test_conversations_with_characters_that_the_tokenizer_lacks_are_left_out_and_counted(caplog):
    caplog.set_level("INFO")
    tokenizer = train_characters("abc ?")
    talks = [
        conversation("a?", "b"),
        conversation("a?", "é"),
        conversation("b?", "c"),
        conversation("d", "a"),
    ]
    rows = conversation_rows(named(talks), tokenizer, 64, 0)
    assert [len(conversation_digests(rows[split])) for split in rows] == [1, 1]
    assert "2 of 4 conversations have characters that the model's tokenizer lacks (talk 2: " in caplog.text
    assert "'é'" in caplog.text
    with pytest.raises(DataError, match=r"no conversation fits the model: 1 of 1 .*talk 1: character 'd'"):
        conversation_rows(named(talks[3:]), tokenizer, 64, 0)


def test_a_conversation_of_just_a_row_fits(tiny_tokenizer):
    talk = conversation("Hi", "Hi.")
    length = len(render(talk, tiny_tokenizer)[0])
    assert rows_of([talk], tiny_tokenizer, length).epoch_rows() == 1
    with pytest.raises(DataError):
        rows_of([talk], tiny_tokenizer, length - 1)


def test_text_that_spells_special_tokens_stays_text(tiny_tokenizer, caplog):
    talks = [conversation(special_text(), special_text()), conversation("a", "b")]
    ids, _ = render(talks[0], tiny_tokenizer)
    assert sum(token >= tiny_tokenizer.text_size for token in ids) == 5  # bos, two marks a turn
    rows = rows_of(talks, tiny_tokenizer, 512)
    inputs = rows.batch(0, 1).inputs
    assert int((inputs >= tiny_tokenizer.text_size).sum()) == 10
    assert "1 conversations contain the text of a special token" in caplog.text


def test_packed_conversations_do_not_see_each_other(tiny_tokenizer, random_model):
    talks = [conversation("Hello there", "Hi."), conversation("dog", "fox")]
    model = random_model(tiny_config())

    def losses(talks):
        rows = rows_of(talks, tiny_tokenizer, 64)
        total = torch.zeros(())
        for i in range(rows.epoch_rows()):
            batch = rows.batch(i, 1)
            total += model(batch.inputs, batch.targets, document_start=batch.document_start).detach()
        return total

    together = losses(talks)
    torch.testing.assert_close(together, losses(talks[:1]) + losses(talks[1:]), rtol=1e-5, atol=1e-5)


def split_conversations(talks: list[list[dict]]) -> tuple[list[list[dict]], list[list[dict]]]:
    """The conversations that train, and those that validate. A character is a token here."""
    kept = Tokens(300)
    for talk in named(talks):
        size = sum(len(message["content"]) for message in talk.messages)
        kept.add(talk, [len(kept.stops)] * size, [True] * size)
    found = kept.documents().values()
    return tuple([talks[part.tokens[start]] for start in part.starts] for part in found)


def test_equal_conversations_are_on_the_same_side_and_none_is_lost():
    talks = [conversation(f"question {i % 300}", "answer") for i in range(900)]
    train, held_out = split_conversations(talks)
    keys = [{json.dumps(t) for t in side} for side in (train, held_out)]
    assert not keys[0] & keys[1] and len(train) + len(held_out) == 900
    assert 0.01 < len(held_out) / 900 < 0.1
    assert train == [talk for talk in talks if talk in train]  # in the order of the file


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_of_few_conversations_a_short_one_validates_whatever_their_hashes_are(count):
    for start in range(60):
        talks = [conversation(f"question {start + i}", "answer" + " and more" * 2**i) for i in range(count)]
        train, validation = split_conversations(talks)
        assert train and validation
        if count == 1:
            assert train == validation == talks
        else:
            assert sorted(map(str, train + validation)) == sorted(map(str, talks))
            assert len(str(validation)) < max(0.15 * len(str(talks)), 2 * len(str(talks[:1])))


def test_copies_of_one_conversation_train_and_validate():
    talks = [conversation("a", "b")] * 3
    assert split_conversations(talks) == (talks, talks)
    train, validation = split_conversations([*talks, conversation("a", "short, but longer than one of them")])
    assert {len(train), len(validation)} == {1, 3}


def test_much_of_the_text_never_validates():
    random = np.random.default_rng(0)
    for _ in range(50):
        count = random.integers(2, 200)
        draws, sizes = random.random(count), random.pareto(0.5, count) + 1
        validates = held_out(draws, sizes)
        share = sizes[validates].sum() / sizes.sum()
        assert validates.any() and (share <= 0.1 or sizes[validates] == sizes.min())
        assert share <= 0.5


def test_the_dataset_s_own_splits_are_kept(tiny_tokenizer):
    talks = [conversation(f"{i}", "b") for i in range(6)]
    found = [*named(talks[:2], "train"), *named(talks[2:], "validation")]
    rows = conversation_rows(found, tiny_tokenizer, 64, 0)
    assert {split: len(conversation_digests(rows[split])) for split in rows} == {"train": 2, "validation": 4}


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
    mixture = built_in(texts, seed=0, refuse=True)
    assert mixture == built_in(texts, seed=0, refuse=True) != built_in(texts, seed=1, refuse=True)
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
    monkeypatch.setattr("hotlap.train.data.conversations.CHARACTERS_AT_ONCE", 5)
    found = list(rendered(named(talks), tiny_tokenizer, 1000, LeftOut()))
    assert found == [(talk, *render(talk.messages, tiny_tokenizer)) for talk in named(talks)]


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

    rows = rows_of(talks(), tiny_tokenizer)
    assert rows.shards[0]().tokens.dtype == np.uint16 and not alive


@pytest.mark.parametrize("stages", [((1.0, 1.0),), ((0.5, 1.0), (1.0, 1.0))])
def test_epochs_are_as_many_passes_and_hardly_more(tiny_tokenizer, stages):
    rows = rows_of([conversation("a" * 40, "b")] * 37, tiny_tokenizer)
    config = SFTConfig(batch_rows=4, epochs=2, schedule=ScheduleConfig(stages=stages))
    seen = rows_in_all(config.schedule, 4, epoch_steps(config, rows))
    assert rows.epoch_rows() == 37 and 2 * 37 <= seen < 2 * 37 + 8


def test_equal_conversations_have_equal_digests(tiny_tokenizer):
    talks = [conversation("a", "b"), conversation("a", "c"), conversation("a", "b")]
    first, second, third = conversation_digests(rows_of(talks, tiny_tokenizer, 64))
    assert first == third != second
    alone = conversation_digests(rows_of(talks[1:2], tiny_tokenizer))
    assert alone == [second]


def test_a_name_is_a_file_of_the_folder_the_home_folder_or_a_built_in_one(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hotlap.train.data.conversations.documentation_tasks", lambda seed, refuse: [])
    talk = conversation("a", "b")
    (tmp_path / "tasks").write_text(json.dumps({"messages": talk}))
    for name in ("./tasks", "~/tasks"):
        assert [found.messages for found in conversations_of(name, seed=0)] == [talk]
    assert not caplog.text
    assert not list(conversations_of("tasks", seed=0))
    assert "tasks: the built-in conversations, not the file of that name, which is ./tasks" in caplog.text
    with pytest.raises(ValueError, match="the name of the data is empty"):
        list(conversations_of(" ", seed=0))


def test_smoltalk_is_downloaded_once_and_mixed_with_the_tasks_but_refusals(
    hub_server, tmp_path, monkeypatch, caplog
):
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
    refused = [conversation("anything else", "no")]
    monkeypatch.setattr(
        "hotlap.train.data.conversations.documentation_tasks",
        lambda seed, refuse: refused if refuse else tasks,
    )
    found = list(conversations_of("smoltalk", seed=0))
    for split, files in (("train", names[1:]), ("validation", names[:1])):
        wanted = [talk for name in files for talk in smoltalk_conversations(name)[:-1]]
        assert [talk.messages for talk in found if talk.split == split] == wanted
    assert [talk.messages for talk in found if talk.split is None] == tasks
    assert caplog.text.count("skipped 1 of 21 conversations, the first: ") == 5
    assert "parquet:21: the conversation does not end with the assistant's answer" in caplog.text

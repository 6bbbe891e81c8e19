"""Conversations as rows of training data, and which of them validate."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.small_runs import conversation, special_text
from helpers.talks import ALONE, named, rows_of, split_rows, with_a_sum
from helpers.tools import tiny_config

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.conversation import render
from hotlap.model.tokenizer import train_characters
from hotlap.train.data.conversation_rows import (
    conversation_digests,
    conversation_rows,
    documents_by_split,
    held_out,
)
from hotlap.train.data.conversation_tokens import Tokens
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all
from hotlap.train.sft import SFTConfig, epoch_steps


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
        rows = split_rows(order, tiny_tokenizer)
        assert sorted(len(conversation_digests(rows[split])) for split in rows) == [1, 11]
        record, _ = caplog.messages
        place = f"talk {order.index(talks[0]) + 1}"
        assert "left out: 1 of 13 conversations are longer than the model's context of 64 tokens" in record
        assert f"({place}: " in record
    with pytest.raises(DataError, match=r"no conversation fits the model: 1 of 1 .* context of 64 tokens"):
        split_rows(talks[:1], tiny_tokenizer)


def test_conversations_with_characters_that_the_tokenizer_lacks_are_left_out_and_counted(caplog):
    caplog.set_level("INFO")
    tokenizer = train_characters("abc ?")
    talks = [
        conversation("a?", "b"),
        conversation("a?", "é"),
        conversation("b?", "c"),
        conversation("d", "a"),
    ]
    rows = split_rows(talks, tokenizer)
    assert [len(conversation_digests(rows[split])) for split in rows] == [1, 1]
    assert "2 of 4 conversations have characters that the model's tokenizer lacks (talk 2: " in caplog.text
    assert "'é'" in caplog.text
    with pytest.raises(DataError, match=r"no conversation fits the model: 1 of 1 .*talk 1: character 'd'"):
        split_rows(talks[3:], tokenizer)


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
    kept = Tokens(300, ALONE, 0)
    for talk in named(talks):
        size = sum(len(message["content"]) for message in talk.messages)
        kept.add(talk, [len(kept.stops)] * size, [True] * size)
    found = documents_by_split(kept).values()
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
        assert sizes[validates].sum() <= 0.1 * sizes.sum()


def test_the_dataset_s_own_splits_are_kept(tiny_tokenizer):
    talks = [conversation(f"{i}", "b") for i in range(6)]
    found = [*named(talks[:2], "train"), *named(talks[2:], "validation")]
    rows = conversation_rows(found, tiny_tokenizer, 64, 0, ALONE)
    assert {split: len(conversation_digests(rows[split])) for split in rows} == {"train": 2, "validation": 4}


def test_equal_conversations_have_equal_digests(tiny_tokenizer):
    talks = [conversation("a", "b"), conversation("a", "c"), conversation("a", "b")]
    first, second, third = conversation_digests(rows_of(talks, tiny_tokenizer, 64))
    assert first == third != second
    alone = conversation_digests(rows_of(talks[1:2], tiny_tokenizer))
    assert alone == [second]


@pytest.mark.parametrize("stages", [((1.0, 1.0),), ((0.5, 1.0), (1.0, 1.0))])
def test_epochs_are_as_many_passes_and_hardly_more(tiny_tokenizer, stages):
    rows = rows_of([conversation("a" * 40, "b")] * 37, tiny_tokenizer)
    config = SFTConfig(batch_rows=4, epochs=2, schedule=ScheduleConfig(stages=stages))
    seen = rows_in_all(config.schedule, 4, epoch_steps(config, rows))
    assert rows.epoch_rows() == 37 and 2 * 37 <= seen < 2 * 37 + 8

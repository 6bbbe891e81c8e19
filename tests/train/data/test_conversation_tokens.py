"""Conversations as tokens, without more memory than these need."""

import weakref

import numpy as np
from helpers.small_runs import conversation, special_text
from helpers.talks import named, rows_of, with_a_sum, with_python

from hotlap.model.conversation import render
from hotlap.train.data.conversation_rows import conversation_digests
from hotlap.train.data.conversation_tokens import rendered
from hotlap.train.data.left_out import LeftOut


def test_text_that_cannot_fit_is_not_encoded(tiny_tokenizer, monkeypatch):
    """Where it is very long, that would take much memory, or more stack than a library has."""
    encode_batch = tiny_tokenizer.encode_batch

    def encode(texts: list[str]) -> list[list[int]]:
        assert max(map(len, texts)) < 1_000_000
        return encode_batch(texts)

    monkeypatch.setattr(tiny_tokenizer, "encode_batch", encode)
    long = [conversation(" " * 1_000_000, "a"), with_python("#" * 1_000_000)]
    rows = rows_of([*long, conversation("a", "b")], tiny_tokenizer)
    assert len(conversation_digests(rows)) == 1


def test_texts_that_are_encoded_together_are_what_they_are_alone(tiny_tokenizer, monkeypatch):
    talks = [
        with_a_sum(),
        with_python(special_text()),
        conversation(special_text(), "é 5"),
        *[conversation(f"{i}", "b") for i in range(9)],
    ]
    monkeypatch.setattr("hotlap.train.data.conversation_tokens.CHARACTERS_AT_ONCE", 5)
    found = list(rendered(named(talks), tiny_tokenizer, 1000, LeftOut("conversations")))
    assert found == [(talk, *render(talk.messages, tiny_tokenizer)) for talk in named(talks)]


def test_rows_take_conversations_one_at_a_time_and_keep_tokens_only(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hotlap.train.data.conversation_tokens.CHARACTERS_AT_ONCE", 100)
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

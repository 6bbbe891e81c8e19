"""Which documents train and which validate."""

import logging
from collections import Counter
from itertools import islice

import pytest

from hotlap.common.errors import DataError
from hotlap.train.data import splits
from hotlap.train.data.splits import digest, labelled, validates


def split(documents, name="some"):
    parts = {"train": [], "validation": []}
    for label, text in labelled(documents, name):
        parts[label].append(text)
    return parts["train"], parts["validation"]


def text_that(validating: bool, length: int) -> str:
    """A text of this length that the hash puts on this side."""
    return next(t for i in range(10**6) if validates(digest(t := f"{i} ".ljust(length, "x"))) == validating)


def size(texts) -> int:
    return sum(map(len, texts))


def test_about_one_document_in_twenty_validates_by_its_hash_alone():
    documents = [f"document number {i}" for i in range(4000)]
    train, held_out = split(documents)
    assert held_out == [t for t in documents if validates(digest(t))] and 0.03 < len(held_out) / 4000 < 0.07
    assert train == [t for t in documents if not validates(digest(t))]
    assert set(split(reversed(documents))[1]) == set(held_out)


def test_one_text_is_split_as_nanogpt_does():
    for text in (text_that(False, 999), text_that(True, 999)):
        assert split([text]) == ([text[:899]], [text[899:]])


@pytest.mark.parametrize("long_validates", [False, True])
@pytest.mark.parametrize("short_validates", [False, True])
@pytest.mark.parametrize("short", [20, 900])
def test_of_a_long_and_a_short_text_most_of_the_text_trains(long_validates, short_validates, short):
    documents = [text_that(long_validates, 10_000), text_that(short_validates, short)]
    for order in (documents, documents[::-1]):
        train, held_out = split(order)
        assert size(train) + size(held_out) == 10_000 + short
        assert 0.01 < size(held_out) / size(train) < 0.12


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 30, 100])
def test_few_texts_leave_some_text_to_validate_on(count):
    for validating in (False, True):
        documents = [text_that(validating, 50 + i) for i in range(count)]
        train, held_out = split(documents)
        assert size(train) + size(held_out) == size(documents) and 0 < size(held_out) < 0.13 * size(train)


def test_a_document_without_text_is_left_out_before_the_split(caplog):
    long = text_that(False, 1000)
    blank = next(" \n" * n for n in range(1, 9999) if validates(digest(" \n" * n)))
    with caplog.at_level(logging.INFO, "hotlap"):
        assert split([blank, "", long, "\t"], "blank documents") == ([long[:900]], [long[900:]])
    assert caplog.messages == ["blank documents: left out 3 documents or files without text"]
    with pytest.raises(DataError, match="'nothing' holds no text"):
        split(["", " "], "nothing")


def test_a_giant_that_hashes_to_validation_leaves_the_text_to_train_on():
    small = [f"document number {i}" for i in range(300)]
    giant = text_that(True, 100_000)
    for place in (0, 150, 300):
        train, held_out = split([*small[:place], giant, *small[place:], giant])
        assert train.count(giant) == 2 or size(held_out) < 0.12 * size(train)
        assert held_out and giant not in held_out


def test_the_end_of_a_giant_validates_where_the_documents_before_it_are_small():
    small = [f"document number {i}" for i in range(300)]
    giant = text_that(False, 100_000)
    train, held_out = split([*small, giant, *small, giant])
    assert held_out.count(giant[90_000:]) == train.count(giant[:90_000]) == 2


def test_equal_documents_are_kept_and_are_on_the_same_side():
    for documents in (
        [f"rule {i % 10}: be kind" for i in range(100)],
        [f"rule {i % 300}: be kind" for i in range(1000)],
        [text_that(True, 900)] * 3,
        [
            text_that(True, 9000),
            *(text_that(i % 5 == 0, 50 + i % 90) for i in range(400)),
            text_that(True, 9000),
        ],
    ):
        train, held_out = split(documents)
        assert size(train) + size(held_out) == size(documents)
        assert not set(train) & set(held_out) and held_out and size(held_out) < 0.13 * size(train)
        if not any(len(text) > 1000 for text in documents) and len(set(documents)) > 3:
            assert Counter(train + held_out) == Counter(documents)


def test_documents_stream_once_both_splits_have_some():
    taken = []
    endless = (taken.append(i) or f"text {i}" for i in range(10**9))
    assert len(list(islice(labelled(endless, "endless"), 2000))) == 2000 and len(taken) < 3000


def test_what_is_held_back_is_bounded(monkeypatch):
    monkeypatch.setattr(splits, "HELD_BACK", 1000)
    taken = []
    same = text_that(False, 50)
    stream = labelled((taken.append(i) or same for i in range(10**9)), "the same again")
    parts = list(islice(stream, 200))
    assert len(taken) < 200 and {label for label, _ in parts} == {"train", "validation"}
    assert len({text for label, text in parts if label == "train"}) == 1

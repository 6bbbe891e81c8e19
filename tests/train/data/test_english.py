"""English prose, and the spaces that corpora put around punctuation."""

import pytest

from hotlap.train.data.english import is_english, without_token_spaces


@pytest.mark.parametrize(
    ("spaced", "written"),
    [
        ("It 's ( almost ) `` done '' .", 'It\'s (almost) "done".'),
        ("John `` Hannibal '' Smith said , `` no '' .", 'John "Hannibal" Smith said, "no".'),
        ("We do n't know ; they 've gone .", "We don't know; they've gone."),
        ("It cost $ 50.3 million -LRB- or more -RRB- .", "It cost $50.3 million (or more)."),
        ('They called it " odd " then .', 'They called it "odd" then.'),
    ],
)
def test_words_that_were_set_apart_are_joined_as_people_write(spaced, written):
    assert without_token_spaces(spaced) == written
    assert without_token_spaces(written) == written


def test_text_of_people_stays():
    text = '"Hi," she said. "A file .txt, 3 - 2, and \'so\' on" (twice).'
    assert without_token_spaces(text) == text


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("The keys of the house are on the table by the door.", True),
        ("Die Schlüssel des Hauses liegen auf dem Tisch bei der Tür.", False),
        ("Las llaves de la casa están en la mesa de la puerta.", False),
        ("--all --long --human-readable --sort=size", False),
        ("12 34 56", False),
        ("", False),
    ],
)
def test_english_is_told_from_its_neighbours_and_from_lists(text, english):
    assert is_english(text) == english

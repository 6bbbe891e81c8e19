"""Multiple-choice questions: read, asked, and answered with a letter."""

import pytest

from hotlap.common.errors import DataError
from hotlap.model.conversation import render as render_conversation
from hotlap.model.tokenizer import train_bpe
from hotlap.train.data.tasks.multiple_choice import (
    LETTERS,
    Question,
    conversation,
    question_of,
    questions_of,
    render,
)

CHOICES = ["Mars", "Jupiter", "Venus", "Earth"]
MMLU = {"question": "Which planet is the largest?", "subject": "astronomy", "choices": CHOICES, "answer": 1}
ARC = {
    "id": "1",
    "question": MMLU["question"],
    "choices": {"text": CHOICES, "label": [*"ABCD"]},
    "answerKey": "B",
}
QUESTION = Question(MMLU["question"], tuple(CHOICES), 1)


def arc(labels: list[str], answer: str) -> dict:
    return ARC | {"choices": {"text": CHOICES[: len(labels)], "label": labels}, "answerKey": answer}


@pytest.mark.parametrize("row", [MMLU, {"train": MMLU}, ARC, arc([*"1234"], "2")])
def test_a_row_of_each_dataset_is_the_same_question(row):
    assert question_of(row) == QUESTION and QUESTION.letter == "B"


def test_an_answer_of_three_or_five_choices_is_its_label():
    assert question_of(arc([*"123"], "3")).answer == 2
    with pytest.raises(DataError, match="a `text` and a `label` each"):
        question_of(arc([*"ABCDE"], "E"))


@pytest.mark.parametrize(
    "row, match",
    [
        (MMLU | {"answer": 4}, "the answer 4 must be an index of the 4 choices"),
        (MMLU | {"answer": -1}, "the answer -1 must be an index"),
        (MMLU | {"answer": "B"}, "the answer 'B' must be an index"),
        (MMLU | {"answer": True}, "the answer True must be an index"),
        (MMLU | {"answer": None}, "the answer null must be an index"),
        (MMLU | {"choices": ["one"], "answer": 0}, "1 choices; a question has 2 to 26"),
        (MMLU | {"choices": ["a"] * 27}, "27 choices"),
        (MMLU | {"choices": "abcd"}, "`choices` must be texts, not 'abcd'"),
        (MMLU | {"choices": [*CHOICES, None]}, "`choices` must be texts, not a list of 5"),
        (MMLU | {"question": None}, "needs a `question` in text, not an object with the keys 'question'"),
        ({"train": None}, "needs a `question` in text, not null"),
        (arc([*"ABCD"], "E"), "the answer 'E' must be one of the labels A, B, C, D"),
        (arc([*"1234"], "B"), "the answer 'B' must be one of the labels 1, 2, 3, 4"),
        (arc([*"AABC"], "A"), "must be one of the labels A, A, B, C"),
        (ARC | {"choices": {"text": CHOICES, "label": None}}, "a `text` and a `label` each"),
    ],
)
def test_what_does_not_fit_together_is_refused(row, match):
    with pytest.raises(DataError, match=match):
        question_of(row)


def test_a_letter_in_the_question_is_the_token_of_the_answer(tiny_tokenizer):
    """Whatever stands before it, and also for a tokenizer that has learnt such questions."""
    asked = [render(QUESTION), render(QUESTION._replace(text="Is it\nA. B"))]
    learnt = train_bpe([text * 20 for text in asked], 400)
    for text in ("Which?", "Which ", "1", "é", "x\n", "A", "a b c."):
        for count in (2, 4, len(LETTERS)):
            question = Question(text, tuple(f"choice {i}" for i in range(count)), count - 1)
            for tokenizer in (tiny_tokenizer, learnt):
                ids = tokenizer.encode(render(question))
                for letter in LETTERS[:count]:
                    (token,) = tokenizer.encode(letter)
                    assert token in ids, (text, letter)
    ids, loss_mask = render_conversation(conversation(QUESTION), tiny_tokenizer)
    end = tiny_tokenizer.special["<|assistant_end|>"]
    said = [token for token, counts in zip(ids, loss_mask, strict=True) if counts]
    assert said == [*tiny_tokenizer.encode("B"), end]


def test_a_question_shows_each_choice_after_its_letter():
    lines = render(QUESTION).splitlines()
    assert lines[:5] == [QUESTION.text, "A. Mars", "B. Jupiter", "C. Venus", "D. Earth"]


def test_files_are_read_in_either_format_and_a_bad_row_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for name, rows in {"mmlu": [MMLU] * 3, "train": [{"train": MMLU}] * 3, "arc": [ARC] * 3}.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert list(questions_of(path)) == [(f"{path}:{i}", QUESTION) for i in (1, 2, 3)]
    parquet.write_table(pyarrow.Table.from_pylist([MMLU, MMLU | {"answer": 9}]), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet:2: the answer 9"):
        list(questions_of(tmp_path / "bad.parquet"))

"""GSM8K's problems as conversations with the calculator."""

import pytest

from hotlap.common.errors import DataError
from hotlap.model.conversation import parse_answer, render, spoken
from hotlap.model.messages import call_text, check_messages
from hotlap.train.data.tasks.gsm8k import answer_of, conversation, conversations_of, is_right

QUESTION = "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?"
SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"
)


def test_each_mark_becomes_a_call_and_its_result_in_the_place_where_it_stood(tiny_tokenizer):
    messages = conversation(QUESTION, SOLUTION)
    assert check_messages(messages) == messages  # valid, and already in the plain form
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [m["content"] for m in messages] == [
        QUESTION,
        "Natalia sold 48/2 = ",
        "24",
        "24 clips in May.\nNatalia sold 48+24 = ",
        "72",
        "72 clips altogether.\n#### 72",
    ]
    assert [call_text(m) for m in messages if "tool_calls" in m] == ["48/2", "48+24"]
    ids, loss_mask = render(messages, tiny_tokenizer)
    start = ids.index(tiny_tokenizer.special["<|assistant_start|>"]) + 1
    assert parse_answer(ids[start:-1], tiny_tokenizer) == messages[1:]
    assert answer_of(spoken(ids[start:], tiny_tokenizer)) == "72"
    results = [i for i, token in enumerate(ids) if token == tiny_tokenizer.special["<|result_start|>"]]
    assert len(results) == 2 and not any(loss_mask[i] or loss_mask[i + 1] for i in results)


@pytest.mark.parametrize(
    "mark, kept",
    [
        ("5*.1=.5", "0.5"),
        ("8/2=4.0", "4"),
        ("1000*2=2,000", "2000"),
        ("(3+4)*2=14", "14"),
        ("100/3=33.33", None),  # rounded
        ("2+2=5", None),
        ("20%*50=10", None),
        ("$5*3=15", None),
        ("3 apples=3", None),
        ("48", None),
        ("", None),
        ("a=b=c", None),
        ("1/0=0", None),
    ],
)
def test_a_mark_that_the_calculator_does_not_confirm_is_no_call(mark, kept):
    messages = conversation("How many?", f"That is <<{mark}>>so many.\n#### 7")
    assert check_messages(messages) == messages and "<<" not in str(messages)
    if kept is None:
        assert [m["content"] for m in messages[1:]] == ["That is so many.\n#### 7"]
    else:
        assert [m["content"] for m in messages[1:]] == ["That is ", kept, "so many.\n#### 7"]


@pytest.mark.parametrize(
    "text, answer",
    [
        (SOLUTION, "72"),
        ("#### -5", "-5"),
        ("#### 1,234.50", "1234.50"),
        ("#### $1,000", "1000"),
        ("####7.", "7"),
        ("#### .5", ".5"),
        ("#### 1\n#### 2", "2"),
        ("the answer is 72", None),
        ("#### seventy", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_after_the_last_four_hashes(text, answer):
    assert answer_of(text) == answer


def test_answers_are_compared_as_numbers():
    for same in ("72", "72.0", "072", "72.", "72,"):
        assert is_right(same, "72")
    assert is_right("1000", "1,000") and is_right(".5", "0.50") and is_right("-0", "0")
    for other in (
        "7",
        "720",
        "-72",
        "72.01",
        "",
        "nan",
        "inf",
        "1e2",
        "\N{FULLWIDTH DIGIT SEVEN}",
        "72 apples",
        None,
    ):
        assert not is_right(other, "72")
    assert not is_right("nan", "nan") and not is_right(None, "")


def test_a_file_is_read_with_a_count_of_the_marks_that_are_left_out(tmp_path, caplog):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    caplog.set_level("INFO")
    rows = [
        {"question": QUESTION, "answer": SOLUTION},
        {"question": QUESTION, "answer": "<<1+1=3>>3\n#### 3"},
    ]
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (place, first), (_, second) = conversations_of(path)
    assert place == f"{path}:1" and first == conversation(QUESTION, SOLUTION) and len(second) == 2
    assert "train.parquet: 2 calls of the calculator; 1 other marks are left out" in caplog.text
    parquet.write_table(pyarrow.Table.from_pylist([*rows, {"question": QUESTION, "answer": "72"}]), path)
    with pytest.raises(DataError, match=r"train\.parquet:3: needs a question, and a solution with ####"):
        list(conversations_of(path))

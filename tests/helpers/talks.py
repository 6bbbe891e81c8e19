"""Conversations for tests of training data, and their rows."""

from collections.abc import Iterable, Iterator

from hotlap.model.messages import tool_call
from hotlap.train.data.conversation_rows import conversation_rows
from hotlap.train.data.conversations import Conversation
from hotlap.train.data.mixtures import Part
from hotlap.train.data.rows import PackedRows

ALONE = [Part("talks")]


def with_a_sum() -> list[dict]:
    """A system message, and an answer with a call of the calculator."""
    call = tool_call("calculator", "2+3")
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 and 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]


def with_python(code: str = "print(2 + 3)") -> list[dict]:
    """A question, and an answer with a call of Python."""
    return [
        {"role": "user", "content": "2 and 3?"},
        {"role": "assistant", "content": "So: ", "tool_calls": [tool_call("python", code)]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]


def named(talks: Iterable[list[dict]], split: str | None = None, part: int = 0) -> Iterator[Conversation]:
    return (Conversation(f"talk {i}", talk, split, part) for i, talk in enumerate(talks, 1))


def split_rows(talks: Iterable[list[dict]], tokenizer, T: int = 64) -> dict[str, PackedRows]:
    """The rows of each split of a data set."""
    return conversation_rows(named(talks), tokenizer, T, 0, ALONE)


def rows_of(talks: Iterable[list[dict]], tokenizer, T: int = 64) -> PackedRows:
    """Rows of all these conversations."""
    return conversation_rows(named(talks, "train"), tokenizer, T, 0, ALONE)["train"]

"""GSM8K: word problems of primary school, whose solutions call the calculator.

A solution has marks such as `48/2 = <<48/2=24>>24`: an expression, and its result. Each becomes a call of
the calculator with the expression, and the text goes on after the result. The last line is `#### ` and the
answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.calculator import calculate
from hotlap.model.messages import TOOL, shown, tool_call
from hotlap.train.data.tables import table_rows

MARK = re.compile("<<(.*?)>>")
ANSWER = re.compile(r"####\s*\$?(-?[0-9,]*\.?[0-9]+)")
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)")


def conversations_of(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """A conversation for each problem in a parquet file of GSM8K, after its place, path:row. How many marks
    are no calls is logged. DataError names the place of a row without question or answer.
    """
    calls = left = 0
    for place, question, solution in problems_of(path):
        messages = conversation(question, solution)
        made = sum("tool_calls" in message for message in messages)
        calls, left = calls + made, left + len(MARK.findall(solution)) - made
        yield place, messages
    if left:
        log.info(
            "%s: %d calls of the calculator; %d other marks are left out, whose result it does not confirm",
            path.name, calls, left,
        )  # fmt: skip


def problems_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, question and solution of each problem in a parquet file of GSM8K."""
    for number, row in enumerate(table_rows(path), 1):
        question, solution = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(solution, str) or answer_of(solution) is None:
            raise DataError(f"{path}:{number}: needs a question, and a solution with #### and a number, "
                            f"not {shown(row)}")  # fmt: skip
        yield f"{path}:{number}", question.strip(), solution


def conversation(question: str, solution: str) -> list[dict]:
    """The problem and its solution, with a call for each mark whose result the calculator confirms. Other
    marks are left out: the text has their results, too.
    """
    messages, said = [{"role": "user", "content": question.strip()}], ""
    *pieces, rest = MARK.split(solution.strip())  # text, mark, text, mark, ..., text
    for text, mark in zip(pieces[::2], pieces[1::2], strict=True):
        said += text
        expression, _, result = mark.rpartition("=")
        found = calculate(expression)
        if is_right(found, result):
            call = tool_call(TOOL, expression)
            messages += [
                {"role": "assistant", "content": said, "tool_calls": [call]},
                {"role": "tool", "content": found},
            ]
            said = ""
    return [*messages, {"role": "assistant", "content": said + rest}]


def answer_of(text: str) -> str | None:
    """The number after the last `####` of a solution, without thousands separators; None without one."""
    found = ANSWER.findall(text)
    return found[-1].replace(",", "") if found else None


def is_right(answer: str | None, expected: str) -> bool:
    """Whether both are the same number, however it is written: 4, 4.0 or 04."""
    numbers = [text.replace(",", "").strip() for text in (answer or "", expected)]
    return all(map(NUMBER.fullmatch, numbers)) and Decimal(numbers[0]) == Decimal(numbers[1])

"""MBPP: small Python functions to write, each with tests (the sanitized part, 427 problems)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.model.messages import shown
from hotlap.train.data.tables import table_rows

QUESTION = "{problem}\nYour code should pass this test:\n{test}"


def problems_in(path: Path) -> Iterator[tuple[str, dict]]:
    """The question of each row, which shows the first of its tests, and a record with all of them: `tests`,
    and the `imports` that they need. DataError names the place of another row.
    """
    for number, row in enumerate(table_rows(path), 1):
        problem, tests, imports = (row.get(key) for key in ("prompt", "test_list", "test_imports"))
        if not isinstance(problem, str) or not is_texts(tests) or not tests or not is_texts(imports or []):
            raise DataError(f"{path}:{number}: needs a `prompt` and a `test_list`, not {shown(row)}")
        text = QUESTION.format(problem=problem.strip(), test=tests[0])
        yield text, {"tests": tests, "imports": imports or []}


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)

"""The reward of code by its tests, in a stand-in for the sandbox that runs trusted code."""

import contextlib
import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

from hotlap.train.rewards import code
from hotlap.train.rewards.code import code_of, passing

RECORD = {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "imports": ["import math"]}
RIGHT = "def add(a, b):\n    return math.floor(a + b)"


def run(program: str) -> SimpleNamespace:
    """What a sandbox says of a program that needs none."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        except BaseException as error:
            return SimpleNamespace(text=said.getvalue() + repr(error), ok=False, reason="exit code 1")
    return SimpleNamespace(text=said.getvalue(), ok=True, reason="")


@pytest.fixture(autouse=True)
def sandbox(monkeypatch):
    module = ModuleType("hotlap.model.sandbox")
    module.require_sandbox = lambda what: SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "hotlap.model.sandbox", module)
    return module


@pytest.mark.parametrize(
    "answer, reward",
    [
        (RIGHT, 1.0),
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.", 1.0),
        (f"```python\nx\n```\nNo:\n```\n{RIGHT}", 1.0),
        ("def add(a, b):\n    return 0", 0.25),
        ("def add(a, b):\n    return 3", 0.25),
        ("def add(a, b):\n    return -1", 0.0),
        ("def other(): pass", 0.0),
        ("def add(:", 0.0),
        ("I cannot.", 0.0),
        ("", 0.0),
        ("raise SystemExit", 0.0),
        ("print('passed 2'); raise SystemExit", 0.0),
        (f"{RIGHT}\nprint('and', end='')", 1.0),
        ("def add(a, b):\n    raise SystemExit", 0.0),
    ],
)
def test_code_is_rewarded_by_the_tests_that_it_passes(answer, reward):
    assert passing(answer, RECORD) == reward


def test_code_that_breaks_the_sandboxs_limits_gets_nothing(sandbox):
    def run_into_a_limit(program: str) -> SimpleNamespace:
        return SimpleNamespace(text=run(program).text, ok=False, reason="timeout")

    sandbox.require_sandbox = lambda what: SimpleNamespace(run=run_into_a_limit)
    assert passing(RIGHT, RECORD) == 0.0


def test_code_cannot_say_itself_that_its_tests_passed(monkeypatch):
    """The mark is not among the names of the code, and another one each time."""
    marks = []
    token = code.secrets.token_hex
    monkeypatch.setattr(code.secrets, "token_hex", lambda n: marks.append(token(n)) or marks[-1])
    peek = "print(sorted(globals()))\nprint(passed, 2)"
    assert passing(peek, RECORD) == passing(peek, RECORD) == 0.0
    assert len(set(marks)) == 2


def test_the_last_block_of_an_answer_is_its_code():
    assert code_of("```py\na\n```\n```python\nb\n```") == "b\n"
    assert code_of("a = '`'") == "a = '`'"

"""The reward of code by its tests."""

import pytest

from hotlap.model.sandbox import find_sandbox
from hotlap.train.data.prompts import rewards_of
from hotlap.train.rewards.code import code_of, passing
from hotlap.train.rewards.guarded import Guarded, Sample

RECORD = {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "imports": ["import math"]}
RIGHT = "def add(a, b):\n    return math.floor(a + b)"


@pytest.fixture(autouse=True, scope="module")
def sandbox():
    if find_sandbox() is None:
        pytest.skip("no sandbox works here, so no code is run")


@pytest.mark.parametrize(
    "answer, reward",
    [
        (RIGHT, 1.0),
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.", 1.0),
        ("def add(a, b):\n    return 3", 0.25),
        ("def add(a, b):\n    return -1", 0.0),
        ("def add(:", 0.0),
        ("I cannot.", 0.0),
        ("", 0.0),
        ("raise SystemExit", 0.0),
        ("def add(a, b):\n    return 1 // (1 - a) * 0", 0.25),
        ("import os; print('passed'); os._exit(0)", 0.0),
        ("def add(a, b):\n    while a or b: pass\n    return 0", 0.0),
        ("while True: print('x' * 1000)", 0.0),
    ],
)
def test_code_is_rewarded_by_the_tests_that_it_passes(answer, reward):
    assert passing(answer, RECORD) == reward


def test_code_runs_in_the_sandbox_from_the_rewards_processes_too():
    (reward,) = rewards_of(("mbpp",), None).values()
    with Guarded([reward]) as guarded:
        answers = (RIGHT, "import os\nos.fork()\n" + RIGHT, "open('/etc/passwd')\n" + RIGHT)
        assert guarded.score([Sample(reward, answer, RECORD) for answer in answers]) == [1.0, 0.0, 0.0]


def test_the_last_block_of_an_answer_is_its_code():
    assert code_of("```py\na\n```\n```python\nb\n```") == "b\n"
    assert code_of(f"```python\nx\n```\nNo:\n```\n{RIGHT}") == RIGHT
    assert code_of("a = '`'") == "a = '`'"

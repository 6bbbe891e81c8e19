"""Code and its tests in the sandbox: what passes, and what only ends well."""

import pytest

from hotlap.model.sandbox import find_sandbox
from hotlap.train.rewards.unit_tests import count_passed, run_tests

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
GOOD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def sandbox():
    found = find_sandbox()
    if found is None:
        pytest.skip("no sandbox works on this machine")
    return found


@pytest.mark.parametrize(
    "code",
    [
        GOOD, "from operator import add", GOOD + "print('done')", GOOD + "print('no newline', end='')",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\n"
        "def add(a: int, b: int) -> int:\n    return P(a).x + b\n",
        GOOD + "if __name__ == '__main__':\n    input()\n", GOOD + "s = 'é \\u2028 \"\"\"'\n",
    ],
)  # fmt: skip
def test_right_code_passes(sandbox, code):
    assert run_tests(sandbox, code, TESTS)


@pytest.mark.parametrize(
    "code",
    [
        "", "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return 5\n", "def add(a, b:",
        "return 5",
        "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "quit()",
        GOOD + "import sys\nsys.stdout = None\nsys.__stdout__.close()",
        "def add(a, b):\n    while True: pass\n",
        "print('ok' * 10**6)", "def add(a, b):\n    raise SystemExit(0)\n",
    ],
)  # fmt: skip
def test_code_that_is_wrong_or_ends_before_its_tests_fails(sandbox, code):
    assert not run_tests(sandbox, code, TESTS, seconds=2)


def test_tests_are_counted_one_by_one_whatever_is_printed(sandbox):
    tests = ["assert add(2, 3) == 5", "assert add(2, 3) == 6", "add()", "assert add(0, 0) == 0"]
    assert count_passed(sandbox, "def add(a, b):\n    print('sum')\n    return a + b", tests) == 2
    assert count_passed(sandbox, "print('passed 4'); print(sorted(globals()))", tests) == 0

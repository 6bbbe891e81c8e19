"""Tests of code: how many pass, in a sandbox that is stood in for."""

from types import SimpleNamespace

import pytest
from helpers.fake_sandbox import Outcome

from hotlap.train.rewards.unit_tests import count_passed, run_tests

CODE = "def half(x):\n    print('half of', x)\n    return x / 2"
TESTS = ["assert half(2) == 1", "assert half(2) == 2", "half()", "assert half(0) == 0"]


def sandbox(capfd, **changed):
    """Runs trusted code here."""

    def run(program: str, seconds: float) -> Outcome:
        try:
            exec(program, {})
        except BaseException as error:
            return Outcome(capfd.readouterr().out + repr(error), False, "exit code 1")
        return Outcome(capfd.readouterr().out, True, "")._replace(**changed)

    return SimpleNamespace(run=run)


def test_tests_are_counted_one_by_one_whatever_is_printed(capfd):
    assert count_passed(sandbox(capfd), CODE, TESTS) == 2
    assert run_tests(sandbox(capfd), CODE, TESTS[0])
    assert not run_tests(sandbox(capfd), CODE, "\n".join(TESTS))


@pytest.mark.parametrize(
    "code", ["def half(:", "raise SystemExit", "half = exit", "def half(x): raise SystemExit"]
)
def test_code_that_ends_early_passes_nothing(code, capfd):
    assert count_passed(sandbox(capfd), code, TESTS) == 0


def test_code_that_breaks_a_limit_passes_nothing(capfd):
    assert count_passed(sandbox(capfd, ok=False, reason="timeout"), CODE, TESTS) == 0


def test_code_cannot_print_that_its_tests_passed(capfd):
    said = "print('passed 4'); print(sorted(globals()))"
    assert count_passed(sandbox(capfd), said, TESTS) == 0

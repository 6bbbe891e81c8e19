"""The calculator: right on arithmetic, and safe on anything else."""

import random
import threading
from fractions import Fraction

import pytest

from hotlap.model.tools import TOOLS, calculate, run_tool


def random_sum(dice: random.Random, depth: int) -> str:
    if depth == 0:
        return str(dice.randint(0, 99))
    left, right = random_sum(dice, depth - 1), random_sum(dice, dice.randrange(depth))
    return f"({left} {dice.choice('+-*')} {right})"


def test_whole_numbers_are_exact():
    dice = random.Random(0)
    for _ in range(200):
        expression = random_sum(dice, dice.randint(1, 4))
        assert calculate(expression) == str(eval(expression.replace(" ", "")))


@pytest.mark.parametrize(
    "expression, result",
    [
        ("2+3", "5"), (" 12 * 12 ", "144"), ("7/2", "3.5"), ("6/2", "3"), ("0.1+0.2", "0.3"), ("7//2", "3"),
        ("-7%3", "2"), ("2**10", "1024"), ("-(3-5)", "2"), ("+4", "4"), ("2**-1", "0.5"), ("1e3", "1000"),
        ("123456789*987654321", "121932631112635269"), ("10**299", "1" + "0" * 299),
    ],
)  # fmt: skip
def test_arithmetic(expression, result):
    assert calculate(expression) == result


def test_division_is_right_to_ten_digits():
    dice = random.Random(0)
    for _ in range(100):
        a, b = dice.randint(1, 10**6), dice.randint(1, 10**6)
        assert abs(Fraction(calculate(f"{a}/{b}")) / Fraction(a, b) - 1) < 1e-9


@pytest.mark.parametrize(
    "expression",
    [
        "x", "pi", "abs(1)", "(1).real", "'a'", "'a'*3", "b'a'", "True", "None", "...", "1j", "[1]",
        "1,000", "(1, 2)", "{1: 2}", "1 if 1 else 2", "1 < 2", "1 and 2", "not 1", "~1", "1 << 2",
        "1 | 2", "lambda: 1", "x := 1", "f'{1}'", "__import__('os')", "1; 2", "import os", "", " ", "2+",
        ")", "1\n2", "\0", "1\0", "\ud800", "(-8)**0.5", "٣+٤", "\uff11\uff0b\uff11", "\uff11", "²",
        "@", "await 1", "yield",
    ],
)  # fmt: skip
def test_anything_else_is_not_arithmetic(expression):
    assert calculate(expression) == "error: not arithmetic"


@pytest.mark.parametrize(
    "expression",
    [
        "1/0", "1//0", "1%0", "0**-1", "9**9**9", "10**1000", "10**300", "2**1001", "1e308*10", "1e999",
        "1e999-1e999", "10**299*10**299", "(10**30)**1000", "10.0**999", "((9**99)**99)**99",
        "10**299*1e200",
    ],
)  # fmt: skip
def test_what_has_no_result_of_a_bearable_size_says_so(expression):
    assert calculate(expression) == "error: no finite result"


@pytest.mark.parametrize(
    "expression", ["(" * 100 + "1" + ")" * 99, "-" * 199 + "1", "(" * 200, "1" + "+1" * 99]
)
def test_depth_is_bounded(expression):
    assert calculate(expression) == "error: not arithmetic"


def test_length_is_bounded():
    assert calculate("1" * 201) == calculate("(" * 10**7) == "error: too long"
    assert calculate("1" * 200) == "1" * 200


def test_it_works_in_a_thread():
    results = []
    threads = [threading.Thread(target=lambda: results.append(calculate("9**9**9 + 1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["error: no finite result"] * 4


@pytest.mark.parametrize(
    "call, result",
    [
        ("2+3", "5"), ("calculator: 2+3", "5"), ("upper: abc", "ABC"), ("upper:a: b", "A: B"),
        ("abc", "error: not arithmetic"), ("lower: abc", "error: not arithmetic"),
    ],
)  # fmt: skip
def test_a_call_goes_to_the_tool_that_it_names_or_else_to_the_first(call, result):
    assert run_tool(call, {**TOOLS, "upper": str.upper}) == result

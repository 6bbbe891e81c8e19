"""The table of tools: their names, which of them a call is for, and what a model reads of Python's output."""

import threading
import time

import pytest

from hotlap.model import tools
from hotlap.model.tools import TOOLS, check_tools, described, named_tools, run_python, run_tool, shortened

from helpers.fake_sandbox import FakeSandbox, Outcome  # isort: skip


@pytest.mark.parametrize(
    "call, result",
    [
        ("2+3", "5"), ("python: print(1)", "PRINT(1)"), ("python:a: b", "A: B"), (" python : x", "X"),
        ("python:\nprint(1)\n", "\nPRINT(1)\n"), ("python: if x:\n  y", "IF X:\n  Y"),
        ("abc", "error: not arithmetic"), ("Python: 1", "error: not arithmetic"),
        ("calculator: 2+3", "error: not arithmetic"), ("", "error: not arithmetic"),
    ],
)  # fmt: skip
def test_a_call_goes_to_python_if_it_says_so_and_else_to_the_calculator(call, result):
    assert run_tool(call, {**TOOLS, "python": str.upper}) == result


def test_a_tool_that_is_not_there_is_an_error_text():
    assert run_tool("python: 1", TOOLS) == "error: there is no tool python"
    assert run_tool("1+1", {"python": str.upper}) == "error: there is no tool calculator"


@pytest.mark.parametrize(
    "names, said",
    [
        ([], "no --tools; known: calculator, python"), (["pyton"], "'pyton'; did you mean 'python'"),
        (["calculator", "shell"], "unknown tool: 'shell'; known: calculator, python"),
    ],
)  # fmt: skip
def test_names_of_tools_are_checked(names, said):
    for check in (check_tools, named_tools):
        with pytest.raises(ValueError, match=said):
            check(names)


def test_python_runs_in_the_sandbox_and_calls_run_at_the_same_time(monkeypatch):
    monkeypatch.setattr(tools, "usable_cores", lambda: 3)
    together = threading.Barrier(3, timeout=20)
    sandbox = FakeSandbox(lambda code: together.wait() is not None and Outcome(code.upper(), True, ""))
    sandbox.install(monkeypatch)
    table = named_tools(["python", "calculator", "python"])
    assert [*table] == ["python", "calculator"] and described(
        [*table]
    ) == "python (sandbox: fake), calculator"
    found = [run_tool(f"python: {code}", table) for code in "abc"]
    assert [future.result(20) for future in found] == ["A", "B", "C"]
    assert run_tool("1+1", table) == "2"


def test_a_cancelled_call_ends_its_program(monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    class Endless(FakeSandbox):
        def run(self, code, seconds, cancelled):
            begun.set()
            while not cancelled():
                time.sleep(0.001)
            ended.set()
            return Outcome("", False, "cancelled")

    Endless(lambda code: None).install(monkeypatch)
    call = named_tools(["python"])["python"]("while True: pass")
    assert begun.wait(20) and call.cancel() and ended.wait(20) and call.cancelled()


def test_what_no_tool_should_raise_reaches_who_waits_for_it(monkeypatch):
    FakeSandbox(lambda code: [][0]).install(monkeypatch)
    with pytest.raises(IndexError):
        named_tools(["python"])["python"]("1").result(20)


def test_the_calculator_needs_no_sandbox(monkeypatch):
    FakeSandbox(None).install(monkeypatch)
    assert named_tools(["calculator"]) == TOOLS and described(["calculator"]) == "calculator"
    with pytest.raises(
        ValueError, match="the tool python runs code that the model writes, and needs a sandbox"
    ):
        named_tools(["calculator", "python"])


@pytest.mark.parametrize(
    "outcome, text",
    [
        (Outcome("5\n", True, ""), "5"), (Outcome("", True, ""), ""),
        (Outcome("", False, "timeout"), "error: timeout"),
        (Outcome("1\n2\n", False, "memory"), "1\n2\nerror: memory"),
        (Outcome("KeyError: 1\n", False, "exit code 1"), "KeyError: 1\nerror: exit code 1"),
    ],
)  # fmt: skip
def test_what_a_model_reads_of_an_outcome(outcome, text):
    assert run_python(FakeSandbox(lambda code: outcome), "code") == text


def test_a_sandbox_that_cannot_start_is_an_error_text():
    def fails(code):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    assert run_python(FakeSandbox(fails), "1").startswith("error: the code could not be run: ")


def test_a_long_result_keeps_its_beginning_and_its_end_and_says_what_is_gone():
    text = run_python(FakeSandbox(lambda code: Outcome("a" * 5000 + "b" * 5000, False, "exit code 1")), "1")
    assert len(text) < 1100 and text.startswith("aaa") and text.endswith("bbb\nerror: exit code 1")
    assert "[9,019 characters left out]" in text
    assert shortened("x" * 1000) == "x" * 1000

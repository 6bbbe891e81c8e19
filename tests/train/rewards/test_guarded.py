"""A reward that goes wrong costs its sample, and nothing else."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotlap.train.rewards.guarded import Failure, Guarded, Sample

HERE = "helpers.reward_functions"
BEHAVES = f"{HERE}:behaves"
LENGTH = f"{HERE}:length"


def scores(answers: list[str], reward: str = BEHAVES, seconds: float = 20, **options) -> list:
    with Guarded([reward], seconds, **options) as guarded:
        return guarded.score(
            [Sample(reward, answer, {"number": i}, f"a.jsonl:{i}") for i, answer in enumerate(answers, 1)]
        )


def gone(pid: int) -> bool:
    """Whether a process has ended, at last: it may take a moment."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_rewards_come_in_the_order_of_the_samples():
    answers = ["a" * n for n in (5, 1, 4, 2, 3)]
    assert scores(answers, LENGTH) == [0.5, 0.1, 0.4, 0.2, 0.3]


def test_samples_of_several_rewards_are_scored_together():
    samples = [Sample(LENGTH, "ab", {"most": 4}), Sample(f"{HERE}:matches", "c", {"answer": "c"})]
    with Guarded([sample.reward for sample in samples]) as guarded:
        assert guarded.score(samples) == [0.5, 1.0]
        assert guarded.score([]) == []


@pytest.mark.parametrize("name", ["matches", "scalar"])
def test_a_bool_and_a_scalar_of_numpy_are_numbers(name):
    with Guarded([f"{HERE}:{name}"]) as guarded:
        (score,) = guarded.score([Sample(f"{HERE}:{name}", "a", {"answer": "a"})])
    assert type(score) is float and score in (0.5, 1.0)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("nan", "it returned nan, not a finite number"),
        ("infinity", "it returned inf"),
        ("None", "it returned NoneType, not a number"),
        ("string", "it returned str"),
        ("list", "it returned list"),
        ("complex", "it returned complex"),
        ("shape", r"it returned a Shaped of shape \[1\], not one number"),
        ("array", r"it returned a ndarray of shape \[3\]"),
        ("huge", "too large"),
        ("large", r"it returned 1e\+10; a reward must be from -1e\+09 to 1e\+09"),
        ("raise", r"RuntimeError: first line second line of 2 \(reward_functions.py:\d+: raise Runtime"),
        ("exit", "SystemExit: 3"),
        ("die", "exit code 4"),
        ("crash", "ended by SIGSEGV"),
    ],
)
def test_a_reward_that_fails_costs_its_sample_alone(answer, reason):
    before, failure, after = scores(["fine", answer, "fine"])
    assert (before, after) == (1.0, 1.0)
    assert isinstance(failure, Failure) and "\n" not in failure.reason
    assert re.search(reason, failure.reason), failure.reason


@pytest.mark.parametrize("answer", ["sleep", "loop", "stuck in C", "catch all"])
def test_a_reward_that_hangs_costs_its_sample_alone(answer):
    before, failure, after = scores(["fine", answer, "fine"], seconds=1)
    assert (before, after) == (1.0, 1.0)
    assert failure == Failure("it took longer than 1 s")


def test_what_a_reward_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    with Guarded([BEHAVES], seconds=1) as guarded:
        (failure,) = guarded.score([Sample(BEHAVES, "start a process", {"file": str(file)})])
    assert isinstance(failure, Failure)
    assert gone(int(file.read_text()))


def test_a_reward_that_forks_answers_once():
    assert scores(["fork", "nan", "fork", "fine"])[::2] == [1.0, 1.0]
    first, failure, last = scores(["fork", "nan", "fine"])
    assert (first, last) == (1.0, 1.0) and isinstance(failure, Failure), "each has its own reward"


def test_what_a_reward_prints_is_not_taken_for_an_answer(capfd):
    assert scores(["print", "print", "fine"]) == [1.0, 1.0, 1.0]
    assert capfd.readouterr().out == ""


def test_slow_rewards_are_called_by_several_processes_at_once():
    reward = f"{HERE}:slow"
    with Guarded([reward], most=3) as guarded:
        assert guarded.score([Sample(reward, "a", {})] * 40) == [1.0] * 40
        assert len(guarded.processes) == 3
        assert guarded.score([Sample(reward, "a", {})] * 3) == [1.0] * 3
    assert guarded.processes == []


def test_the_first_failure_of_a_kind_is_logged_and_the_others_are_counted(caplog):
    with caplog.at_level(logging.INFO), Guarded([BEHAVES]) as guarded:
        samples = [Sample(BEHAVES, "raise", {"number": i}, f"a.jsonl:{i}") for i in range(1, 16)]
        guarded.score([*samples, Sample(BEHAVES, "nan", {})])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "a.jsonl:1, which is left out" in lines[0] and "RuntimeError: first line" in lines[0]
    assert "10 answers so far" in lines[1] and "RuntimeError at reward_functions.py" in lines[1]
    assert "nan" in lines[2]
    assert sorted(guarded.failures.values()) == [1, 15]


@pytest.mark.parametrize(
    "reward, message",
    [
        ("length", "must be package.module:function"),
        ("my_rewards.py", "did you mean my_rewards:function"),
        (":length", "must be package.module:function"),
        (".mine:length", "must be package.module:function"),
        ("no_such_module:f", "there is no module no_such_module; name package"),
        ("helpers.no_such:f", "there is no module helpers.no_such"),
        (f"{HERE}:lenght", f"the module {HERE} has no function lenght; did you mean length?"),
        (f"{HERE}:NOT_CALLABLE", "is int, not a function"),
        (f"{HERE}:of_one", r"takes \(answer\); it must take an answer"),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_is_scored(reward, message):
    with pytest.raises(ValueError, match=message):
        Guarded([reward])


@pytest.mark.parametrize(
    "code, message",
    [
        ("import no_such_package", "cannot import mine: .*no_such_package.*mine.py:1"),
        ("x = = 1", "cannot import mine: SyntaxError"),
        ("import sys; sys.exit(1)", "cannot import mine: SystemExit"),
        ("import os; os._exit(5)", "exit code 5"),
        ("def score(answer, record): return 1.0", "there is no module mime; did you mean mine?"),
    ],
)
def test_a_module_in_the_folder_that_cannot_be_imported_is_refused(code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        Guarded(["mime:score" if "mime" in message else "mine:score"])


def test_a_module_in_the_folder_is_found_without_installing_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("class Short:\n    def score(answer, record): return -len(answer)\n")
    assert scores(["abc"], "mine:Short.score") == [-3.0]


PARENT = f"""
import sys
from hotlap.train.rewards.guarded import Guarded, Sample
with Guarded([{BEHAVES!r}], seconds=2) as guarded:
    print(guarded.processes[0].process.pid, flush=True)
    guarded.score([Sample({BEHAVES!r}, "sleep", {{}})])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_no_process_outlives_its_parent(number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.send_signal(number)
    assert parent.wait(20) != 0
    parent.stdout.close()
    assert gone(child)

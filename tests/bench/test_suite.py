"""The calls of the suite: whatever a phase does, the others have their time, and nothing measured is lost."""

import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from helpers.ranks import CONTEXT
from helpers.suite_phases import (
    crashes,
    dies_twice,
    finds_a_fault,
    hangs,
    needs_a_package,
    out_of_memory,
    works,
)

from hotlap.bench import phases, suite
from hotlap.bench.cases import NO_TIME
from hotlap.bench.phases import Phase
from hotlap.bench.suite import SuiteConfig, run_suite


@pytest.fixture
def call(monkeypatch):
    """A function that lets the call `look` consist of groups of phases."""
    monkeypatch.setattr(suite, "GRACE", 1)

    def choose(*groups):
        monkeypatch.setitem(phases.CALLS, "look", groups)

    return choose


@pytest.fixture
def forked(monkeypatch):
    """Processes of phases start at once, instead of importing torch each."""
    monkeypatch.setattr(suite.multiprocessing, "get_context", lambda method: CONTEXT)


def test_a_fault_ends_its_own_phase_and_nothing_is_lost(call, forked, tmp_path, capsys):
    call(
        (Phase("first", 60, works),),
        (Phase("hung", 6, hangs, 0.5), Phase("crashed", 60, crashes, 0.5), Phase("beside", 60, works, 0.5)),
        (Phase("memory", 60, out_of_memory), Phase("package", 60, needs_a_package)),
        (Phase("last", 60, works),),
    )
    out = tmp_path / "look"
    assert run_suite(SuiteConfig("look", out=out)) == 1
    page = capsys.readouterr().out
    said = {line.split(":")[0]: line for line in page.splitlines() if line.startswith("== ")}
    assert "FAILED: cut off" in said["== hung"] and "FAILED with exit code -6" in said["== crashed"]
    assert all("done in" in said[f"== {name}"] for name in ("first", "beside", "last"))
    assert "79 GB are not enough" in page and "pip install nothing_like_it" in page
    assert page.count("case 0 | hotlap | ms 1") == 4  # of all that measured something, the hung one too
    assert page.strip() == (out / "summary.txt").read_text().strip()
    with tarfile.open(tmp_path / "look.tar.gz") as archive:
        names = archive.getnames()
    assert {"look/summary.txt", "look/last/kernels.json", "look/hung/log.txt"} <= set(names)
    hung = int((out / "hung" / "began").read_text())
    with pytest.raises(ProcessLookupError):  # it has ended, with what it had started
        for _ in range(500):
            os.killpg(hung, 0)
            time.sleep(0.02)


def test_a_phase_that_dies_goes_on_while_it_measures_more(call, forked, tmp_path):
    call((Phase("kernels", 300, dies_twice), Phase("other", 60, works)))
    assert run_suite(SuiteConfig("look", out=tmp_path / "look", minutes=10)) == 0
    assert (tmp_path / "look" / "kernels" / "runs").read_text() == "011"


def test_a_phase_that_is_complete_and_found_a_fault_is_not_repeated(call, tmp_path):
    call((Phase("kernels", 60, finds_a_fault),))
    assert run_suite(SuiteConfig("look", out=tmp_path / "look")) == 1
    assert (tmp_path / "look" / "kernels" / "runs").read_text() == "x"


def test_results_of_an_earlier_call_never_pass_for_this_ones(call, tmp_path, monkeypatch):
    call()
    (tmp_path / "look" / "kernels").mkdir(parents=True)
    with pytest.raises(ValueError, match="look has files"):
        run_suite(SuiteConfig("look", out=tmp_path / "look"))
    monkeypatch.chdir(tmp_path)
    call((Phase("first", 60, works),))
    run_suite(SuiteConfig("look", minutes=1e-6))
    assert len([path for path in tmp_path.glob("look-20*") if path.is_dir()]) == 1


def test_phases_that_do_not_fit_in_the_time_are_listed(call, tmp_path, capsys):
    call((Phase("first", 60, works),), (Phase("second", 60, works),))
    assert run_suite(SuiteConfig("look", out=tmp_path / "look", minutes=1e-6)) == 0
    assert capsys.readouterr().out.splitlines() == [f"== {name}: {NO_TIME}" for name in ("first", "second")]


def test_phases_may_be_chosen_by_name(call, tmp_path, capsys):
    call((Phase("first", 60, crashes),), (Phase("second", 60, works),))
    assert run_suite(SuiteConfig("look", out=tmp_path / "look", phases=("second",))) == 0
    assert "first" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'second'"):
        run_suite(SuiteConfig("look", out=tmp_path / "look", phases=("secnd",)))


def test_what_is_compiled_goes_to_the_cache_that_is_named(call, tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "before")
    call()
    run_suite(SuiteConfig("look", out=tmp_path / "look", cache=tmp_path / "cache"))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_the_tuning_phase_reaches_the_tuner(tmp_path):
    with pytest.raises(ValueError, match="tune needs a GPU"):
        phases.tuning(tmp_path, 60, False, kernel=("rms_norm",))


TEST = """
import pytest, time

@pytest.mark.gpu
def test_first(): BODY

@pytest.mark.gpu
def test_second(): pass
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [("pass", "2 passed"), ("assert 1 == 2", "1 failed, 1 passed"), ("time.sleep(600)", "no tests ran")],
)
def test_native_tests_are_cut_off_in_time_and_what_failed_is_named(body, says, tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_on_gpu.py").write_text(TEST.replace("BODY", body))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\naddopts = -ra\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    out = tmp_path / "tested"
    out.mkdir()
    limit = "8" if "sleep" in body else "60"  # time for pytest to start on a busy machine
    command = [sys.executable, "-c", RUN_TESTS, str(tmp_path / "tests"), str(out), limit]
    done = subprocess.run(command, env=os.environ)
    assert (done.returncode == 0) == (body == "pass")
    note = (out / "note.txt").read_text()
    assert says in note and ("FAILED" in note) == ("assert" in body)


RUN_TESTS = """
import os, sys
from pathlib import Path
from hotlap.bench import phases

phases.TESTS, phases.ENDING, out = Path(sys.argv[1]), 60, Path(sys.argv[2])
with open(out / "log.txt", "ab") as file:
    os.dup2(file.fileno(), 1)
sys.exit(phases.native_tests(out, float(sys.argv[3]), False, workers=1))
"""


def test_the_calls_run_without_a_package_but_torch_and_numpy(tmp_path):
    code = (
        "import sys\n"
        "for name in ('tokenizers', 'tiktoken', 'safetensors', 'tyro', 'tqdm', 'regex', 'requests'):\n"
        "    sys.modules[name] = None\n"
        "from hotlap.bench import suite\n"
        "if __name__ == '__main__':\n"
        "    for call in ('look', 'check', 'figures'):\n"
        "        assert suite.main(suite.suite_flags(call, '--minutes', '1e-6', '--out', call)) == 0"
    )
    (tmp_path / "bare.py").write_text(code)
    done = subprocess.run([sys.executable, "bare.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(NO_TIME) > 10, done.stderr

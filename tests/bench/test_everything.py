"""`hotlap bench all`: whatever a stage does, the others have their time, and what was measured is there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotlap.bench import everything
from hotlap.bench.timing import NO_TIME

ROOT = Path(__file__).parents[2]


def write(path, notes: list[str], complete: bool = False) -> None:
    rows = [{"case": f"c{i}", "provider": "hotlap", "ms": None, "note": n} for i, n in enumerate(notes)]
    content = {"kind": path.stem, "device": "card", "rows": rows, "complete": complete}
    path.write_text(json.dumps(content))


def test_what_does_not_fit_in_the_time_is_listed_as_skipped(tmp_path, capsys):
    assert everything.bench_all(everything.AllConfig(tmp_path, minutes=0.01)) == 0
    said = capsys.readouterr().out
    assert all(f"{name:13} skipped" in said for name in ("kernels", "training", "inference"))


def test_stages_end_in_order_and_what_they_left_out_is_said(tmp_path, monkeypatch, capsys):
    ends, names = [], []

    def run_stage(stage, path, soft, end, resume):
        ends.append(soft)
        names.append(stage.__name__)
        assert resume == (names.count(stage.__name__) > 1)
        write(path, [NO_TIME, "WRONG: its output is off", NO_TIME], complete=True)
        return "FAILED with exit code 1 after 5 s"

    monkeypatch.setattr(everything, "run_stage", run_stage)
    began = time.monotonic()
    assert everything.bench_all(everything.AllConfig(tmp_path, minutes=10)) == 1
    assert names == ["kernels", "training", "inference", "kernels"]  # which had no time for all before
    assert ends == sorted(ends) and ends[-1] == pytest.approx(began + 600, abs=5)
    lines = capsys.readouterr().out.splitlines()
    assert "training      c1 by hotlap: WRONG: its output is off" in lines
    assert f"training      {NO_TIME}: c0, c2" in lines
    assert (tmp_path / "README.md").exists()


def test_a_stage_that_ends_early_does_the_rest_and_no_more(tmp_path, monkeypatch):
    path, runs = tmp_path / "kernels.json", []

    def dies_twice(stage, arguments, seconds):
        runs.append(arguments[2])
        write(path, ["hung"] * len(runs), complete=len(runs) == 3)
        return 0 if len(runs) == 3 else 1

    monkeypatch.setattr(everything, "run_apart", dies_twice)
    soon = time.monotonic() + 100
    assert everything.run_stage(everything.kernels, path, soon, soon).startswith("done")
    assert runs == [False, True, True]

    def dies(stage, arguments, seconds):
        runs.append(arguments[2])
        return 1

    path.unlink()
    monkeypatch.setattr(everything, "run_apart", dies)
    assert everything.run_stage(everything.kernels, path, soon, soon).startswith("FAILED with exit code 1")
    assert len(runs) <= 5  # nothing more came of it


def test_kernels_that_were_cut_off_or_had_no_time_are_gone_on_with(tmp_path):
    path = tmp_path / "kernels.json"
    assert not everything.is_late(path)  # nothing can be continued
    write(path, ["WRONG"], complete=True)
    assert not everything.is_late(path)
    write(path, ["WRONG", NO_TIME], complete=True)
    assert everything.is_late(path)
    write(path, ["WRONG"])
    assert everything.is_late(path)


def test_a_stage_that_hangs_is_ended():
    began = time.monotonic()
    assert everything.run_apart(time.sleep, (600,), 1) is None
    assert time.monotonic() - began < 20


TEST = """
import pytest, time

@pytest.mark.gpu
def test_first(): BODY

@pytest.mark.gpu
def test_second(): pass
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "2 passed"),
        ("assert 1 == 2", "FAILED: 1 failed, 1 passed"),
        ("time.sleep(600)", "cut off: no tests ran"),
    ],
)
def test_native_tests_are_cut_off_in_time_and_their_report_is_kept(body, says, tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_on_gpu.py").write_text(TEST.replace("BODY", body))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    monkeypatch.setattr(everything, "SHORTEST_STAGE", 0)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    seconds = 2.5 if "sleep" in body else 60
    report = tmp_path / "report.txt"
    found = everything.native_tests(tmp_path / "tests", report, time.monotonic() + seconds)
    assert found.startswith(says)
    assert "test_on_gpu.py::test_first" in report.read_text()


def test_it_needs_no_package_but_torch_and_numpy(tmp_path):
    code = (
        "import sys\n"
        "for name in ('tokenizers', 'tiktoken', 'safetensors', 'tyro', 'tqdm', 'regex', 'requests'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['everything', '--minutes', '0.01', '--out', sys.argv[1]]\n"
        "from hotlap.bench import everything\n"
        "sys.exit(everything.main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0 and "inference     skipped" in done.stdout, done.stderr

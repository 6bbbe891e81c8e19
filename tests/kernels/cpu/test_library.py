"""The kernels in C are built once for each machine, and what prevents it is said, not hidden."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hotlap.kernels import dispatch
from hotlap.kernels.cpu import library as module
from hotlap.kernels.rms_norm import rms_norm

QUICK = 'exec cc "$@" -O0'
ONE_NORM = """
import torch
from hotlap.kernels.dispatch import kernel_choice
from hotlap.kernels.rms_norm import rms_norm
x = torch.arange(6.0).view(2, 3)
assert kernel_choice("cpu") == "c" and torch.allclose(rms_norm(x).square().mean(-1), torch.ones(2))
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes a shell script the compiler."""

    def write(script: str) -> None:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, compiler) -> Path:
    """An empty cache, nothing loaded, and a compiler that takes little time."""
    compiler(QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module.library.cache_clear()
    yield tmp_path / "cache" / "hotlap" / "cpu"
    module.library.cache_clear()


def break_by(cause: str, monkeypatch, compiler, tmp_path) -> str:
    """Prevent compilation, and return what has to be said."""
    if cause == "a compiler that is missing":
        monkeypatch.setenv("CC", "nonexistent -O1")
        return "no C compiler 'nonexistent'"
    if cause == "no compiler at all":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        return "no C compiler 'cc'"
    if cause == "a compiler that fails":
        compiler("echo 'x.c:1: error: no such instruction' >&2; exit 1")
        return "compiler failed: x.c:1: error: no such instruction"
    if cause == "a compiler that fails for bfloat16":
        compiler('case "$*" in *BFLOAT16*) echo "error: too new" >&2; exit 1;; esac\n' + QUICK)
        return "compiler failed: error: too new"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    return "file"  # which stands where the cache folder has to be


@pytest.mark.parametrize(
    "cause",
    [
        "a compiler that is missing", "no compiler at all", "a compiler that fails",
        "a compiler that fails for bfloat16", "a cache that cannot be written",
    ],
)  # fmt: skip
def test_without_kernels_torch_runs_and_the_reason_is_logged_once_or_an_error(
    cause, choose_kernels, monkeypatch, compiler, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "hotlap")
    said = break_by(cause, monkeypatch, compiler, tmp_path)
    choose_kernels("")
    for x in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bfloat16)):
        assert rms_norm(x).shape == x.shape
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("kernels: torch (no kernels in C: ") and said in lines[0]
    choose_kernels("c")
    with pytest.raises(ValueError, match="HOTLAP_KERNELS=c, but ") as error:
        rms_norm(torch.ones(2, 3))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; install gcc, set CC, or unset it")


def test_an_empty_cc_is_no_wish(choose_kernels, monkeypatch):
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(module, "FLAGS", ("-fPIC", "-shared"))
    choose_kernels("c")
    assert dispatch.kernel_choice("cpu") == "c"


def test_what_is_built_is_kept(cache, compiler):
    compiler(f'echo "$@" >> {cache.parent}/calls; {QUICK}')
    cache.mkdir(parents=True)
    for _ in range(2):
        module.library(torch.float32)
        module.library.cache_clear()
    calls = (cache.parent / "calls").read_text().splitlines()
    assert len([call for call in calls if "--version" not in call]) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_library_is_built_again(cache, keep):
    module.library(torch.float32)
    (path,) = cache.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # not changed in place: it is loaded
    path.write_bytes(content[:keep])
    module.library.cache_clear()
    x = torch.tensor([-1.0, 3.0])
    module.run("relu2", x.dtype, x, 2)
    assert x.tolist() == [0, 9]


def test_processes_may_build_at_the_same_time(cache):
    both = [subprocess.Popen([sys.executable, "-c", ONE_NORM], stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert all(path.suffix == ".so" for path in cache.iterdir())


def test_another_machine_builds_its_own(cache, monkeypatch):
    for cpu in ("one", "another"):
        monkeypatch.setattr(module, "cpu_identity", lambda cpu=cpu: cpu)
        module.library.cache_clear()
        module.library(torch.float32)
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_kernels_run_on_as_many_threads_as_torch_is_told_to():
    code = """
import os, torch
from hotlap.kernels.cpu.library import run
torch.set_num_threads(1)
x, counts = torch.ones(100_000), []
for threads in (1, 3, 1):
    torch.set_num_threads(threads)
    run("relu2", x.dtype, x, x.numel())
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[0])
"""
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    grown, left = map(int, result.stdout.split())
    assert grown == 2 and left <= 2

"""What a process sets before it computes on a CPU."""

import os
import signal
import subprocess
import sys

import pytest

from hotlap.common import process

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize("set_by_user", [None, *NAMES])
def test_threads_wait_asleep_unless_the_user_says_how_they_wait(set_by_user, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if set_by_user:
        monkeypatch.setenv(set_by_user, "ACTIVE")
    process.wait_asleep()
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert found == ({set_by_user: "ACTIVE"} if set_by_user else {"OMP_WAIT_POLICY": "PASSIVE"})


def test_the_command_says_so_before_torch_is_loaded():
    """For OpenMP reads it when it is loaded."""
    code = """
import os, sys
from hotlap import cli
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit
sys.meta_path.insert(0, Watch())
assert "torch" not in sys.modules
cli.main(["chat"])
"""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["PASSIVE"], result.stderr


def test_freed_memory_is_kept_or_nothing_happens_where_the_c_library_cannot(monkeypatch):
    process.keep_freed_memory()
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())
    process.keep_freed_memory()


@pytest.mark.parametrize("windows", [False, True])
def test_ending_a_session_ends_its_process_where_there_are_sessions_and_where_not(windows, monkeypatch):
    if windows:
        monkeypatch.delattr(os, "killpg")
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as child:
        process.end_session(child)
        assert child.wait() == -signal.SIGKILL
    process.end_session(child)  # which is nothing more to end

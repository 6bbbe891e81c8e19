"""Locks between processes, as on POSIX and as on Windows."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
if sys.argv[1] == "windows":
    from helpers.without_posix import hide
    hide()
from hotlap.common.locks import lock
with open("lock", "a+", encoding="utf-8") as file:
    try:
        lock(file, wait=sys.argv[2] == "wait")
    except BlockingIOError:
        raise SystemExit("it is locked")
    file.write(sys.argv[2])
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_one_process_at_a_time_has_the_lock_and_others_read_the_file(tmp_path, system):
    def start(how: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            [sys.executable, "-c", CODE, system, how], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    holder = start("first")
    assert holder.stdout.readline() == "locked\n"
    assert start("at once").communicate() == ("", "it is locked\n")
    waiting = start("wait")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    holder.kill()
    holder.communicate()
    assert waiting.communicate()[0] == "locked\n"
    assert (tmp_path / "lock").read_text(encoding="utf-8") == "wait"

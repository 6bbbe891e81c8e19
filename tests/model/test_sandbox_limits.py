"""Hostile programs in the sandbox end within their limits, and nothing is left of them."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from helpers.sandboxes import TIERS, children, needed

from hotlap.model.sandbox import OUTPUT_BYTES, Outcome

SUBREAPER = 36  # of prctl: orphans become children of this process


@pytest.fixture(params=TIERS)
def box(request):
    return needed(request.param)


@pytest.fixture
def orphans_come_here():
    """What loses its parent becomes a child of this process."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def nothing_left(tmp_path, monkeypatch, orphans_come_here):
    """Fails if a process, an orphan included, or a file is left after the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = children()
    yield
    assert children() <= before
    assert list(tmp_path.iterdir()) == []


def test_long_output_is_cut_and_ends_the_program(box, nothing_left):
    outcome = box.run("while True: print('x' * 1000)", 60)
    assert outcome.reason == "output" and not outcome.ok
    text, _, note = outcome.text.rpartition("\n")
    assert len(text.encode()) == OUTPUT_BYTES and "cut" in note


LOOP = "while True: pass"
CATCHES = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
IGNORES = """
import signal, threading, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
threading.Thread(target=time.sleep, args=(1000,)).start()
"""
CLOSES = "import os, time\nfor i in range(3): os.close(i)\ntime.sleep(1000)"
AT_EXIT = "import atexit, time\natexit.register(time.sleep, 1000)"
FORKS = """
import os, threading
while True:
    for spawn in (os.fork, os.forkpty, lambda: os.posix_spawn("/bin/sh", ["sh"], {})):
        try: spawn()
        except OSError: pass
"""
ORPHAN = """
import os, subprocess, sys, time
try: os.setsid()
except OSError: pass
for _ in range(2):
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
time.sleep(1000)
"""
SIGNALS = """
import os, signal, time
for target in (os.getppid(), 1, 0, -1):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        try: os.kill(target, number)
        except OSError: pass
time.sleep(1000)
"""
SLOW = {
    "loop": LOOP, "sleep": "import time; time.sleep(1000)", "catches all": CATCHES,
    "ignores signals": IGNORES, "closes output": CLOSES, "at exit": AT_EXIT, "fork bomb": FORKS,
    "orphan": ORPHAN, "signals parent": SIGNALS,
    "a regular expression": "import re; re.match('(a+)+$', 'a' * 100 + 'b')", "a power": "x = 9**9**9",
    "reads": "import os; r, w = os.pipe(); os.read(r, 1)",
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_a_program_that_does_not_end_is_ended_and_leaves_no_process(box, nothing_left, name):
    outcome = box.run(SLOW[name], seconds=1)
    assert outcome == Outcome("", False, "timeout")


def test_what_was_printed_before_the_deadline_is_kept(box):
    assert box.run("print('begun')\nwhile True: pass", 1) == Outcome("begun\n", False, "timeout")


def test_a_program_that_is_cancelled_is_ended(box, nothing_left):
    cancelled = iter([False] * 20 + [True])
    outcome = box.run("while True: pass", 1000, cancelled=lambda: next(cancelled))
    assert outcome == Outcome("", False, "cancelled")


def test_memory_is_limited(box, nothing_left):
    assert box.run("x = bytearray(4 << 30)", 20).reason == "memory"
    assert box.run("x = []\nwhile True: x.append(bytearray(1 << 20))", 20).reason == "memory"
    grows = "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass"
    assert box.run(grows, 2).reason == "timeout"


FLOODS = {
    "one file": "file = open('file', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "one file again": "while True:\n    open('file', 'wb').write(bytes(1 << 20))",
    "many files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))",
    "empty files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').close()",
    "removed files": "import os\nx = []\nwhile True:\n    x.append(open('f', 'wb'))\n    os.remove('f')\n"
    "    x[-1].write(bytes(1 << 20))",
}


@pytest.mark.parametrize("name", FLOODS)
def test_files_are_limited(box, nothing_left, name):
    outcome = box.run(FLOODS[name], 30)
    assert not outcome.ok and outcome.reason in ("files", "exit code 1"), outcome
    persistent = "\n".join(f"    {line}" for line in FLOODS[name].splitlines())
    outcome = box.run(f"while True:\n  try:\n{persistent}\n  except BaseException: pass", 30)
    assert outcome.reason == "files"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system in memory")
@pytest.mark.parametrize("gone", ["", "os.unlink(str(i))"])
def test_holes_that_fill_when_they_are_read_are_limited(box, nothing_left, monkeypatch, gone):
    code = f"""
import mmap, os, time
for i in range(40):
    file = os.open(str(i), os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 8 << 20)
    holes = mmap.mmap(file, 8 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    sum(holes[::4096])
    {gone}
time.sleep(1000)
"""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert box.run(code, 30).reason in ("files", "signal 7")  # the latter where its file system is full


def test_threads_are_limited(box, nothing_left):
    code = (
        "import threading, time\nthreading.stack_size(32768)\n"
        "for i in range(10_000): threading.Thread(target=time.sleep, args=(1000,)).start()"
    )
    assert box.run(code, 30).reason == "threads"


def test_a_program_ends_with_the_process_that_runs_it(box, tmp_path, orphans_come_here):
    code = f"from hotlap.model.sandbox import Sandbox\n{box!r}.run('while True: pass', 1000)"
    server = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    while not (started := _descendants(server.pid)) or (box.bwrap and len(started) < 2):
        assert server.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # until it has taken its rights away
    server.send_signal(signal.SIGKILL)
    server.wait()
    for _ in range(200):
        if not any(_runs(id) for id in started):
            break
        time.sleep(0.05)
    for id in started & children():
        os.waitpid(id, 0)
    assert not any(_runs(id) for id in started)


def _runs(id: int) -> bool:
    try:
        with open(f"/proc/{id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descendants(id: int) -> set[int]:
    try:
        with open(f"/proc/{id}/task/{id}/children") as file:
            direct = {int(word) for word in file.read().split()}
    except OSError:
        return set()
    return direct.union(*map(_descendants, direct))

"""The sandbox: normal programs work, hostile ones end, and nothing is left of them."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sandboxes import TIERS, children, needed

from hotlap.model import sandbox
from hotlap.model.sandbox import OUTPUT_BYTES, Outcome, find_sandbox, require_sandbox

SUBREAPER = 36  # of prctl: orphans become children of this process


@pytest.fixture(params=TIERS)
def box(request):
    return needed(request.param)


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Fails if a process, an orphan included, or a file is left after the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    libc = ctypes.CDLL(None)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    before = children()
    yield tmp_path
    libc.prctl(SUBREAPER, 0, 0, 0, 0)
    assert children() <= before
    assert list(tmp_path.iterdir()) == []


def test_modules_of_the_standard_library_work(box):
    code = """
import asyncio, collections, dataclasses, datetime, decimal, functools, hashlib, itertools, json, math, random
import re, statistics, string, tempfile, typing, zlib

@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5

async def later():
    await asyncio.sleep(0.001)
    return "later"

with tempfile.NamedTemporaryFile(), tempfile.TemporaryFile("w+") as file:
    file.write("temporary")
    file.seek(0)
    print(file.read(), asyncio.run(later()))
print(math.comb(5, 2), json.dumps([1]), re.findall("a+", "baab"), Point(1))
print(collections.Counter("aab"), random.Random(0).randint(0, 9), list(itertools.permutations("ab")))
print(datetime.date(2024, 2, 29), hashlib.sha256(b"").hexdigest()[:4], zlib.crc32(b"a"), 2**100)
"""
    assert box.run(code, 20) == Outcome(
        "temporary later\n10 [1] ['aa'] Point(x=1, y=0.5)\n"
        "Counter({'a': 2, 'b': 1}) 6 [('a', 'b'), ('b', 'a')]\n"
        "2024-02-29 e3b0 3904355907 1267650600228229401496703205376\n",
        True,
        "",
    )


def test_threads_work(box):
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    print(sum(pool.map(lambda x: x * x, range(100))))
thread = threading.Thread(target=print, args=("in a thread",))
thread.start()
thread.join()
"""
    assert box.run(code, 20) == Outcome("328350\nin a thread\n", True, "")


def test_files_of_its_own_work_and_do_not_outlive_it(box):
    code = """
import os
with open("text.txt", "w") as file:
    file.write("x" * 100_000)
os.rename("text.txt", "moved.txt")
print(len(open("moved.txt").read()), os.listdir())
os.remove("moved.txt")
open("left", "w").close()
"""
    assert box.run(code, 20) == Outcome("100000 ['moved.txt']\n", True, "")
    assert box.run("import os; print(os.listdir())").text == "[]\n"


def test_output_and_errors_keep_their_order(box):
    code = "import os, sys\nprint('a', end='')\nprint('b', file=sys.stderr)\nos.write(1, b'c')\nprint('d')"
    assert box.run(code).text == "ab\ncd\n"


def test_a_traceback_shows_the_programs_lines_alone(box):
    outcome = box.run("def divide(x):\n    return 1 / x\n\ndivide(0)\n")
    lines = [line for line in outcome.text.splitlines() if "^" not in line and "~" not in line]
    assert lines == [
        "Traceback (most recent call last):",
        '  File "program.py", line 4, in <module>',
        "    divide(0)",
        '  File "program.py", line 2, in divide',
        "    return 1 / x",
        "ZeroDivisionError: division by zero",
    ]
    assert outcome.reason == "exit code 1"
    assert 'File "program.py", line 1\n' in box.run("def f(:").text


def test_exit_codes(box):
    assert box.run("import sys; sys.exit(3)") == Outcome("", False, "exit code 3")
    assert box.run("raise SystemExit") == Outcome("", True, "")
    assert box.run("import sys; sys.exit('no')") == Outcome("no\n", False, "exit code 1")
    crash = box.run("import ctypes; ctypes.string_at(0)")
    assert crash == Outcome("", False, "signal 11")


def test_standard_input_is_what_is_given_or_empty(box):
    assert box.run("print(input(), input())", stdin="ä\nb\n").text == "ä b\n"
    assert "EOFError" in box.run("input()").text
    long = "x" * 1_000_000
    assert box.run("import sys; print(len(sys.stdin.read()))", stdin=long, seconds=20).text == "1000000\n"


@pytest.mark.parametrize("code", ["", "\0", "\ud800", "# -*- coding: nonsense -*-", "print('\ud800')"])
def test_any_text_is_a_program(box, code):
    assert isinstance(box.run(code), Outcome)


def test_output_that_is_not_unicode_is_replaced(box):
    assert box.run(r"import os; os.write(1, b'a\xff\n')").text == "a\ufffd\n"
    assert box.run(r"print('\ud800')").text == "\\ud800\n"


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


def test_threads_are_limited(box, nothing_left):
    code = (
        "import threading, time\nthreading.stack_size(32768)\n"
        "for i in range(10_000): threading.Thread(target=time.sleep, args=(1000,)).start()"
    )
    assert box.run(code, 30).reason == "threads"


def test_any_thread_may_run_programs(box, nothing_left):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda i: box.run(f"print({i})", 30), range(12)))
    assert outcomes == [Outcome(f"{i}\n", True, "") for i in range(12)]


def test_a_program_ends_with_the_process_that_runs_it(box, nothing_left):
    code = f"from hotlap.model.sandbox import Sandbox\n{box!r}.run('while True: pass', 1000)"
    server = subprocess.Popen([sys.executable, "-c", code])
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


@pytest.fixture
def search(monkeypatch):
    sandbox._search.cache_clear()
    yield monkeypatch
    sandbox._search.cache_clear()


def test_the_strongest_tier_that_works_is_found_once(search, caplog):
    works = {tier: sandbox.Sandbox(tier) for tier in TIERS}
    search.setattr(sandbox, "_tier", works.__getitem__)
    assert find_sandbox() is find_sandbox() is require_sandbox("a tool") is works["bubblewrap"]
    assert [record.message for record in caplog.records] == [
        "code that the model writes runs in a sandbox: bubblewrap"
    ]


def test_without_a_tier_there_is_no_sandbox_and_the_reasons_are_said(search, caplog):
    search.setattr(sandbox.sys, "platform", "darwin")
    assert find_sandbox() is None
    with pytest.raises(
        ValueError, match="a tool runs code that the model writes, and needs a sandbox"
    ) as error:
        require_sandbox("a tool")
    assert "needs Linux, and this is darwin" in str(error.value) and "try " in str(error.value)
    assert len(caplog.records) == 1 and "there is no sandbox" in caplog.text


@pytest.mark.parametrize("broken", ["syscall_filter", "limits", "files"])
def test_a_tier_that_does_not_isolate_is_not_used(broken, search):
    needed("landlock")
    if broken == "syscall_filter":  # one that allows all
        search.setattr(sandbox, "syscall_filter", lambda: bytes.fromhex("06000000 0000ff7f"))
    elif broken == "files":
        search.setattr(sandbox, "_readable", lambda: ("/",))
    else:
        search.setattr(sandbox._Program, "_broken_limit", lambda self: "")
    with pytest.raises(ValueError, match="its self-test failed"):
        sandbox._tier("landlock")

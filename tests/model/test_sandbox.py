"""The sandbox: normal programs work, and it is found where it isolates."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sandboxes import TIERS, needed

from hotlap.model import sandbox
from hotlap.model.sandbox import Outcome, find_sandbox, require_sandbox


@pytest.fixture(params=TIERS)
def box(request):
    return needed(request.param)


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


def test_modules_that_use_files_and_timers_work(box):
    code = """
import pickle, shutil, signal, sqlite3, time, unittest, zipfile

class Pair(tuple):
    pass

def ring(number, frame):
    print("rang", pickle.loads(pickle.dumps(Pair((1, 2)))))

signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.1)
with zipfile.ZipFile("file.zip", "w") as archive:
    archive.writestr("name", "text")
shutil.copyfile("file.zip", "copy.zip")
print(zipfile.ZipFile("copy.zip").namelist())
with sqlite3.connect("database") as database:
    database.execute("create table numbers (x)")
    database.execute("insert into numbers values (3)")
print(sqlite3.connect("database").execute("select x from numbers").fetchall())

class Check(unittest.TestCase):
    def test(self):
        self.assertEqual(1 + 1, 2)

unittest.main()
"""
    outcome = box.run(code, 20)
    assert outcome.ok and outcome.text.startswith("rang (1, 2)\n['name']\n[(3,)]\n"), outcome


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


def test_a_process_without_standard_input_runs_programs(box):
    kept = os.dup(0)
    os.close(0)  # the next file that is opened gets this number
    try:
        outcome = box.run("print(input())", stdin="given")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert outcome == Outcome("given\n", True, "")


@pytest.mark.parametrize("code", ["", "\0", "\ud800", "# -*- coding: nonsense -*-", "print('\ud800')"])
def test_any_text_is_a_program(box, code):
    assert isinstance(box.run(code), Outcome)


def test_output_that_is_not_unicode_is_replaced(box):
    assert box.run(r"import os; os.write(1, b'a\xff\n')").text == "a\ufffd\n"
    assert box.run(r"print('\ud800')").text == "\\ud800\n"


def test_any_thread_may_run_programs(box):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda i: box.run(f"print({i})", 30), range(12)))
    assert outcomes == [Outcome(f"{i}\n", True, "") for i in range(12)]


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
    search.setattr(sandbox, "SELF_TEST_SECONDS", 2)
    if broken == "syscall_filter":  # one that allows all
        search.setattr(sandbox, "syscall_filter", lambda: bytes.fromhex("06000000 0000ff7f"))
    elif broken == "files":
        search.setattr(sandbox, "_readable", lambda: ("/",))
    else:
        search.setattr(sandbox.Program, "_broken_limit", lambda self: "")
    with pytest.raises(ValueError, match="its self-test failed"):
        sandbox._tier("landlock")


NO_NAMESPACES = "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1"
NOT_BUBBLEWRAP = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'


@pytest.mark.parametrize("script", [NO_NAMESPACES, NOT_BUBBLEWRAP])
def test_where_bubblewrap_does_not_isolate_landlock_does(search, tmp_path, caplog, script):
    needed("landlock")
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    search.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_sandbox() == sandbox.Sandbox("landlock")
    assert "bubblewrap: its self-test failed" in sandbox._search()[1]

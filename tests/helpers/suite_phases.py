"""Phases that tests of the suite run, in processes that import them from here."""

import json
import os
import subprocess
import sys
import time


def write(folder, count: int, complete: bool = True) -> None:
    rows = [{"case": f"case {i}", "provider": "hotlap", "ms": 1.0 + i} for i in range(count)]
    content = {"kind": "kernels", "device": "card", "rows": rows, "complete": complete}
    (folder / "kernels.json").write_text(json.dumps(content))


def works(folder, limit, resume):
    write(folder, 2)


def hangs(folder, limit, resume):
    write(folder, 1)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "began").write_text(str(os.getpid()))
    time.sleep(600)


def crashes(folder, limit, resume):
    os.abort()  # as a lost context makes a process do


def dies_twice(folder, limit, resume):
    path = folder / "runs"
    runs = path.read_text() if path.exists() else ""
    path.write_text(f"{runs}{int(resume)}")
    write(folder, len(runs) + 1, complete=len(runs) == 2)
    if len(runs) < 2:
        os.abort()


def out_of_memory(folder, limit, resume):
    raise MemoryError("79 GB are not enough")


def needs_a_package(folder, limit, resume):
    raise ImportError("this phase needs nothing_like_it: pip install nothing_like_it")


def finds_a_fault(folder, limit, resume):
    with open(folder / "runs", "a") as file:
        file.write("x")
    write(folder, 3)
    return 1

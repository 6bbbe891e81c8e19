"""Whether code that a model wrote passes its tests, which run after it in the sandbox."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlap.model.sandbox import Sandbox

SECONDS = 5.0  # for code and tests together
# The code is a module of its own, which does not know the mark. So it fails if it ends early: by sys.exit, or
# os._exit. But code passes if it looks for the mark in the interpreter's frames, or replaces what runs the
# tests or what they compare with.
PROGRAM = """
import sys, types
module = sys.modules["solution"] = types.ModuleType("solution")
exec(compile({code!r}, "solution.py", "exec"), module.__dict__)
passed = 0
for text in {tests!r}:
    try:
        exec(compile(text, "tests.py", "exec"), module.__dict__)
    except Exception:
        continue
    passed += 1
sys.stdout.flush()
sys.__stdout__.write("\\n{mark} %d\\n" % passed)
"""


def count_passed(sandbox: Sandbox, code: str, tests: list[str], seconds: float = SECONDS) -> int:
    """How many of the tests, Python that raises where one fails, run to their end after the code; 0 if one
    ends the program, or all together take longer.
    """
    mark = secrets.token_hex(16)
    outcome = sandbox.run(PROGRAM.format(code=code, tests=tests, mark=mark), seconds)
    found = re.search(rf"\n{mark} (\d+)\n\Z", outcome.text)
    return int(found[1]) if found and outcome.ok else 0


def run_tests(sandbox: Sandbox, code: str, tests: str, seconds: float = SECONDS) -> bool:
    """Whether the tests run to their end after the code."""
    return count_passed(sandbox, code, [tests], seconds) == 1

"""Whether code that a model wrote passes its tests, which run after it in the sandbox."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlap.model.sandbox import Sandbox

SECONDS = 5.0  # for code and tests together
# The code is a module of its own, which does not know the mark. So it fails if it ends early: by sys.exit, or
# os._exit. Code that looks for the mark in the interpreter's frames would find it.
PROGRAM = """
import sys, types
module = sys.modules["solution"] = types.ModuleType("solution")
for text, name in (({code!r}, "solution.py"), ({tests!r}, "tests.py")):
    exec(compile(text, name, "exec"), module.__dict__)
sys.stdout.flush()
sys.__stdout__.write("\\n{mark}\\n")
"""


def run_tests(sandbox: Sandbox, code: str, tests: str, seconds: float = SECONDS) -> bool:
    """Whether the tests, Python that raises where one fails, run to their end after the code."""
    mark = secrets.token_hex(16)
    outcome = sandbox.run(PROGRAM.format(code=code, tests=tests, mark=mark), seconds)
    return outcome.ok and outcome.text.endswith(f"\n{mark}\n")

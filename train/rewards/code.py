"""The reward of code that the model writes: its tests, run in the sandbox."""

from __future__ import annotations

import re
import secrets

from hotlap.train.rewards.verifiers import PARTIAL

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
# The code has its own names, and the mark, which says how many tests passed, is not among them.
PROGRAM = """
names = {{"__name__": "solution"}}
exec(compile({code!r}, "solution.py", "exec"), names)
passed = 0
for test in {tests!r}:
    try:
        exec(test, names)
        passed += 1
    except Exception:
        pass
print("\\n{mark}", passed, flush=True)
"""


def passing(answer: str, record: dict) -> float:
    """1 if the code passes all `tests` of the record, else PARTIAL of the share that it passes."""
    tests = record["tests"]
    passed = count_passed(code_of(answer), tests, record.get("imports") or [])
    return 1.0 if passed == len(tests) else PARTIAL * passed / len(tests)


def count_passed(code: str, tests: list[str], imports: list[str]) -> int:
    """How many of the tests pass after the code, in the sandbox; 0 if the code does not end by itself.
    ValueError if no sandbox works here.
    """
    from hotlap.model.sandbox import require_sandbox

    mark = secrets.token_hex(8)
    program = PROGRAM.format(code="\n".join([*imports, code]), tests=tests, mark=mark)
    outcome = require_sandbox("the reward of code").run(program)
    found = re.search(rf"^{mark} (\d+)$", outcome.text, re.MULTILINE)
    return int(found[1]) if found and outcome.ok else 0


def code_of(answer: str) -> str:
    """The last block of Python in an answer, or all of an answer without one."""
    blocks = BLOCK.findall(answer)
    return blocks[-1] if blocks else answer

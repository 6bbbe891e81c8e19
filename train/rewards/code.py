"""The reward of code that the model writes: its tests, run in the sandbox."""

from __future__ import annotations

import re

from hotlap.train.rewards.unit_tests import count_passed
from hotlap.train.rewards.verifiers import PARTIAL

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def passing(answer: str, record: dict) -> float:
    """1 if the code passes all `tests` of the record, else PARTIAL of the share that it passes. ValueError if
    no sandbox works here.
    """
    from hotlap.model.sandbox import require_sandbox

    sandbox, tests = require_sandbox("the reward of code"), record["tests"]
    code = "\n".join([*(record.get("imports") or []), code_of(answer)])
    passed = count_passed(sandbox, code, tests)
    return 1.0 if passed == len(tests) else PARTIAL * passed / len(tests)


def code_of(answer: str) -> str:
    """The last block of Python in an answer, or all of an answer without one."""
    blocks = BLOCK.findall(answer)
    return blocks[-1] if blocks else answer

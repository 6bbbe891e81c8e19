"""What reinforcement learning asks: prompts, with the records that their rewards read.

`--data` names a built-in source, a data set on the hub, a task of reasoning-gym, or a file. Each has a reward
(`train/rewards/`), by its name, `package.module:function`; files need `--reward`.
"""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.train.data import hub
from hotlap.train.data.datasets import GSM8K, MBPP, Dataset
from hotlap.train.data.prompt_files import read_prompts, split_prompts
from hotlap.train.data.record_files import record_files
from hotlap.train.data.splits import SPLITS
from hotlap.train.data.tasks import (
    arithmetic,
    built_in,
    gsm8k,
    mbpp,
    reasoning_gym,
    spelling,
    sums,
    unknown_names,
)
from hotlap.train.data.text_files import named_path

SUMS, HELD_OUT = 4000, 200  # questions made by rules: to train on, and held out
CALCULATOR = ("calculator",)
VERIFIERS = "hotlap.train.rewards.verifiers"


class Prompt(NamedTuple):
    """messages: they end with the user's. record: what the reward may read. source: its name in `--data`.
    place: FILE:LINE, or SOURCE:NUMBER.
    """

    messages: list[dict]
    record: dict
    source: str
    place: str


class Source(NamedTuple):
    """ask: questions and records of a split, for a seed. reward: `package.module:function`. tools: names of
    those that the model may call. dataset: what is downloaded, and its splits for ours. check: raises
    ValueError or ImportError if it cannot be used.
    """

    ask: Callable[[str, int], Iterable[tuple[str, dict]]]
    reward: str
    tools: tuple[str, ...] = ()
    dataset: Dataset | None = None
    hub_splits: tuple[str, ...] = ()
    check: Callable[[], object] = lambda: None


def on_hub(dataset: Dataset, validation: str, read: Callable, reward: str, **fields) -> Source:
    """A source of a data set's training split, which validates on another split of it. read: questions and
    records of a file.
    """
    hub_splits = ("train", validation)

    def ask(split: str, seed: int) -> Iterator[tuple[str, dict]]:
        for name in dataset.files[hub_splits[SPLITS.index(split)]]:
            yield from read(dataset.folder / name)

    return Source(ask, reward, dataset=dataset, hub_splits=hub_splits, **fields)


def answered(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, dict]]:
    return ((text, {"answer": answer}) for text, answer in pairs)


vocabulary = cache(built_in.vocabulary)


def spellings(split: str, seed: int) -> Iterator[tuple[str, dict]]:
    """Every trained word once, in a phrasing that is trained on, or every held-out one."""
    if split == "validation":
        return answered(spelling.held_out(vocabulary(), len(vocabulary())))
    generator = random.Random(f"prompts {seed}")
    trained = (word for word in vocabulary() if not spelling.is_held_out(word))
    return answered(
        (generator.choice(spelling.PHRASINGS).format(word), spelling.spelled(word)) for word in trained
    )


def head_sums(split: str, seed: int) -> Iterator[tuple[str, dict]]:
    if split == "validation":
        return answered(sums.questions(HELD_OUT, 0, held_out=True))
    return answered(sums.questions(SUMS, seed, held_out=False))


def calculations(split: str, seed: int) -> Iterator[tuple[str, dict]]:
    if split == "validation":
        return answered((text, result_of(said)) for text, said in arithmetic.held_out(HELD_OUT))
    made = arithmetic.training_conversations(SUMS, seed)
    return answered((talk[0]["content"], result_of(talk[-1]["content"])) for talk in made)


def result_of(sentence: str) -> str:
    """The number of an answer such as `12 + 5 = 17`."""
    return sentence.rpartition("= ")[2]


def names(split: str, seed: int) -> Iterator[tuple[str, dict]]:
    return answered(unknown_names.mixed_questions(seed, held_out=split == "validation"))


def word_problems(path: Path) -> Iterator[tuple[str, dict]]:
    for _, problem, solution in gsm8k.problems_of(path):
        yield problem, {"answer": gsm8k.answer_of(solution)}


SOURCES = {
    "spelling": Source(spellings, f"{VERIFIERS}:spelling"),
    "names": Source(names, f"{VERIFIERS}:same"),
    "sums": Source(head_sums, f"{VERIFIERS}:total"),
    "arithmetic": Source(calculations, f"{VERIFIERS}:result", CALCULATOR),
    "gsm8k": on_hub(GSM8K, "test", word_problems, f"{VERIFIERS}:solution", tools=CALCULATOR),
    "mbpp": on_hub(MBPP, "validation", mbpp.problems_in, "hotlap.train.rewards.code:passing"),
}
NEEDED = f"name a .jsonl or .parquet file, {', '.join(SOURCES)}, or {reasoning_gym.PREFIX}TASK"


def source_of(name: str) -> Source | None:
    """The source of a name in `--data`; None if it is a file."""
    if not name.startswith(reasoning_gym.PREFIX):
        return SOURCES.get(name)
    task = name.removeprefix(reasoning_gym.PREFIX)

    def ask(split: str, seed: int) -> Iterator[tuple[str, dict]]:
        return reasoning_gym.questions(task, seed, split == "validation")

    return Source(
        ask,
        "hotlap.train.rewards.gym:score",
        check=partial(reasoning_gym.check_task, task),
    )


def tools_of(name: str, of_files: tuple[str, ...]) -> tuple[str, ...]:
    """The tools that the model may call when it answers prompts of this name."""
    source = source_of(name)
    return source.tools if source else of_files


def rewards_of(data: Sequence[str], reward: str | None) -> dict[str, str]:
    """The reward of each name in `--data`, `package.module:function`: the given one for all, if one is."""
    return {name: reward or source_of(name).reward for name in data}


def check_prompt_data(data: Sequence[str], reward: str | None) -> None:
    """Raise for what is no source and no file, is there twice, lacks a reward or cannot be used here:
    ValueError, FileNotFoundError, ImportError. Files are read to their ends (DataError). The function that
    `--reward` names is not tried: `Guarded` does.
    """
    if not data:
        raise ValueError(f"no data is named; {NEEDED}")
    seen = set()
    for name in data:
        identity = identity_of(name)
        if identity in seen:
            raise ValueError(f"the data {name} is there twice; name it once")
        seen.add(identity)
    for name in data:
        source = source_of(name)
        if source is None:
            if not reward:
                raise ValueError(
                    f"the data {name} is a file, which needs --reward package.module:function, a function of "
                    "an answer and its record"
                )
            for path, _ in record_files(named_path(name)):
                for _ in read_prompts(path):
                    pass
        else:
            source.check()
    if "mbpp" in data and not reward:
        from hotlap.model.sandbox import require_sandbox

        require_sandbox("the data mbpp")


def identity_of(name: str) -> str:
    """What tells whether two names are the same data. Raises for what is no source and no file."""
    path = named_path(name)
    if source_of(name):
        if path.exists():
            log.info("%s: hotlap's own data set, not your file, which is ./%s", name, name)
        return name
    if os.path.lexists(path):
        record_files(path)  # whose error says what is wrong with a folder
        return os.path.realpath(path)
    before, colon, _ = name.rpartition(":")
    if colon and (before in SOURCES or os.path.lexists(named_path(before or name))):
        raise ValueError(f"the data {name} has a weight, which only `hotlap sft` knows; write {before}")
    near = difflib.get_close_matches(name, [*SOURCES, reasoning_gym.PREFIX], n=1)
    hint = f"did you mean {near[0]}? Else " if near else ""
    raise FileNotFoundError(f"no prompts at {name}; {hint}{NEEDED}")


def prompt_plans(data: Sequence[str]) -> list[hub.DownloadPlan]:
    """What `download_prompts` will download."""
    sources = [source for name in data if (source := source_of(name)) and source.dataset]
    return [hub.plan_download(s.dataset, s.dataset.folder, hub_files(s)) for s in sources]


def hub_files(source: Source) -> list[str]:
    return [file for split in source.hub_splits for file in source.dataset.files[split]]


def download_prompts(data: Sequence[str]) -> None:
    """Download and check what `data` names on the hub and is not in the cache yet."""
    for name in data:
        source = source_of(name)
        if source and source.dataset:
            hub.download(source.dataset, source.dataset.folder, hub_files(source))


def prompts_of(data: Sequence[str], split: str, seed: int) -> list[Prompt]:
    """All prompts of a split, `train` or `validation`, name by name: the same for the same seed, and those
    that validate for any. Data sets on the hub must have been downloaded (`download_prompts`).

    What validates, of any name, is never trained on; but a single prompt is both.
    """
    found = [prompt for name in data for prompt in asked(name, split, seed)]
    if split == "train":
        held_out = {key_of(prompt) for name in data for prompt in asked(name, "validation", seed)}
        kept = [prompt for prompt in found if key_of(prompt) not in held_out]
        if len(kept) < len(found) and len(set(map(key_of, found))) > 1:
            log.info("left out: %d prompts to train on that also validate", len(found) - len(kept))
            found = kept
    if not found:
        raise DataError(f"no prompt in {', '.join(data)} is for {split}; name more data")
    return found


def key_of(prompt: Prompt) -> str:
    return repr(prompt.messages)


def asked(name: str, split: str, seed: int) -> Iterator[Prompt]:
    """The prompts of one name."""
    source = source_of(name)
    if source is None:
        for place, messages, record in split_prompts(named_path(name), split):
            yield Prompt(messages, record, name, place)
        return
    for number, (text, record) in enumerate(source.ask(split, seed), 1):
        yield Prompt([{"role": "user", "content": text}], record, name, f"{name}:{number}")

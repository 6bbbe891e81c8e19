"""Which of an evaluation's records were in a model's training text.

A record counts as seen if any 13 words of it in a row are in a training text, as GPT-3's authors counted. A
shorter record counts if it is a whole message. Case, spaces and punctuation do not matter; signs of sums do.
Words that more than ten records of a task share are how the task asks, and say nothing about a record.

The records' runs of words are kept as hashes, and training texts are streamed past them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.manifest import MANIFEST, read_manifest
from hotlap.model.weights import model_folder, stage
from hotlap.train.data.conversations import conversations_of
from hotlap.train.data.mixtures import parts_of
from hotlap.train.data.preferences import SAMPLED, pairs_of
from hotlap.train.data.prompts import prompts_of
from hotlap.train.evaluation.chat_tasks import Asked
from hotlap.train.evaluation.core import candidates
from hotlap.train.evaluation.core_bundle import Task
from hotlap.train.run.folder import base_of, run_of
from hotlap.train.sampled_pairs import SAMPLES, read_samples

IN_A_ROW = 13  # words
SHARED = 10  # records of a task
WORD = re.compile(r"\w+|(?<=[\s\d])[-+*/%^=<>](?=[\s\d])")
WORDS_AT_ONCE = 1 << 18  # of training texts
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
END = 1 << 62  # after each text, as the hash of a word that no record has
FILTER = 1 << 24  # bits of a hash that tell most runs of words apart at once


class Overlap(NamedTuple):
    """How many of a task's records are in the training text, and the first few of them."""

    count: int
    examples: list[str]


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold()) or text.split()  # brackets alone, for example


def runs_of(hashes: np.ndarray) -> np.ndarray:
    """The hash of each run of IN_A_ROW words, uint64, from the words' hashes."""
    count = len(hashes) - IN_A_ROW + 1
    runs = np.zeros(max(0, count), np.uint64)
    for i in range(IN_A_ROW if count > 0 else 0):
        runs = runs * FACTOR + hashes[i : i + count]
    return runs


def word_hashes(words: list[str]) -> np.ndarray:
    return np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)


class Records:
    """The records of tasks, as what is looked for in training texts."""

    def __init__(self, records: dict[str, list[str]]):
        self.whole: dict[int, list[tuple[str, int]]] = {}  # hash of all words -> (task, number)
        runs, self.owners = [], []
        for task, texts in records.items():
            found = [np.unique(runs_of(word_hashes(words_of(text)))) for text in texts]
            every = np.concatenate(found) if found else np.zeros(0, np.uint64)
            values, counts = np.unique(every, return_counts=True)
            shared = values[counts > SHARED]
            for number, text in enumerate(texts):
                own = found[number][~np.isin(found[number], shared)]
                if not len(own):
                    self.whole.setdefault(hash(tuple(words_of(text))), []).append((task, number))
                runs.append(own)
                self.owners += [(task, number)] * len(own)
        every = np.concatenate(runs) if runs else np.zeros(0, np.uint64)
        self.runs, self.of_owner = np.unique(every, return_inverse=True)
        self.may_be = np.zeros(FILTER, bool)
        self.may_be[self.runs % FILTER] = True
        self.seen = np.zeros(len(self.runs), bool)
        self.seen_whole: set[tuple[str, int]] = set()

    def look_in(self, texts: list[list[str]]) -> None:
        """Mark the records that are in some texts, given as words."""
        hashes = []
        for words in texts:
            self.seen_whole.update(self.whole.get(hash(tuple(words)), ()))
            hashes += map(hash, words)
            hashes.append(END)
        found = runs_of(np.array(hashes, np.int64).astype(np.uint64))
        found = found[self.may_be[found % FILTER]]
        at = np.searchsorted(self.runs, found)
        known = at < len(self.runs)
        at, found = at[known], found[known]
        self.seen[at[self.runs[at] == found]] = True

    def seen_records(self) -> set[tuple[str, int]]:
        return self.seen_whole | {self.owners[i] for i in np.flatnonzero(self.seen[self.of_owner])}


def looked_in(records: dict[str, list[str]], texts: Iterable[str]) -> Records:
    """The records, with those marked that are in the texts."""
    looked_for = Records(records)
    batch: list[list[str]] = []
    count = 0
    for text in texts:
        batch.append(words_of(text))
        count += len(batch[-1])
        if count > WORDS_AT_ONCE:
            looked_for.look_in(batch)
            batch, count = [], 0
    looked_for.look_in(batch)
    return looked_for


def seen_share(held_out: list[str], texts: Iterable[str]) -> float:
    """The share of the runs of 13 words in held-out documents that are in the training texts, too. Those that
    more than ten of the documents share do not count; 0 if there are none.
    """
    seen = looked_in({"": held_out}, texts).seen
    return float(seen.mean()) if len(seen) else 0.0


def overlaps(records: dict[str, list[str]], texts: Iterable[str]) -> dict[str, Overlap]:
    """For each task, which of its records are in the training texts, one message or document each."""
    looked_for = looked_in(records, texts)
    seen = looked_for.seen_records()
    return {
        task: Overlap(len(found), [texts_[i] for i in found[:3]])
        for task, texts_ in records.items()
        for found in [sorted(number for name, number in seen if name == task)]
    }


def scored_records(
    scores: dict[str, dict], asked: list[Asked], core: list[Task]
) -> tuple[dict[str, dict], dict[str, list[str]]]:
    """The score of each task and its records: questions, or CORE's examples with their right answers."""
    records = {found.task: [question.text for question in found.questions] for found in asked}
    for task in core:
        records[task.label] = [candidates(task, e)[e.get("gold", 0)] for e in task.examples]
    return scores | (scores["core"]["tasks"] if core else {}), records


def mark_seen(scores: dict[str, dict], records: dict[str, list[str]], folder: Path) -> None:
    """Add `in_training`, how many of its records the model was fine-tuned on, to the score of each task, and
    warn where there are some. Reads conversations, pairs and prompts again. If they are not on this machine,
    that is logged and nothing is added or downloaded.
    """
    if not records or stage(folder) == "pretrain":
        return
    try:
        found = overlaps(records, fine_tuning_texts(folder))
    except (OSError, DataError, ImportError) as error:
        log.warning("not checked whether the model was trained on these questions: %s", error)
        return
    for task, (count, examples) in found.items():
        scores[task]["in_training"] = count
        if count:
            log.warning(
                "%s: the model was fine-tuned on %d of its %d records, such as %s; new ones may score lower",
                task, count, len(records[task]), printable(repr(examples[0][:80])),
            )  # fmt: skip


def fine_tuning_texts(folder: Path) -> Iterator[str]:
    """The messages of all conversations, pairs and prompts that a model, and those it was made from, were
    fine-tuned on.

    DataError, OSError or ImportError: a checkpoint does not say what they are, or they cannot be read.
    """
    from tqdm import tqdm

    while (trained_for := stage(folder)) != "pretrain":
        config = read_manifest(folder).get("run") if (folder / MANIFEST).is_file() else None
        if config is None:  # an exported model, or an older checkpoint
            raise DataError(f"{folder} does not say what it was fine-tuned on")
        if trained_for == "sft":
            conversations = conversations_of(parts_of(config["data"]), config["seed"])
            for conversation in tqdm(
                conversations, "compare", unit=" conversations", unit_scale=True, disable=None, leave=False
            ):
                for message in conversation.messages:
                    yield message["content"]
        elif trained_for == "dpo":
            for name in config["data"]:
                pairs = read_samples(run_of(folder) / SAMPLES) if name == SAMPLED else pairs_of(name)
                for pair in pairs:
                    for message in (*pair.prompt, *pair.chosen, *pair.rejected):
                        yield message["content"]
        elif trained_for == "rl":
            for prompt in prompts_of(config["data"], "train", config["seed"]):
                for message in prompt.messages:
                    yield message["content"]
        else:
            log.info("the data of the stage %s, which made %s, are not compared", trained_for, folder)
        base = base_of(run_of(folder), config)
        try:
            folder = model_folder(base)
        except FileNotFoundError:
            log.warning("%s is not here, so what it was trained on is not compared", base)
            return

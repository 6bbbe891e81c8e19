"""`hotlap bench peers --race TEXT`: nanoGPT's recipe for a CPU against our preset shakespeare-char.

Whole commands, as a user runs them, take turns on the same characters. nanoGPT runs in a copy of what it
needs from the checkout. GPUs are hidden from both.
"""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hotlap.bench import results
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.machine import BUSY, cpu_seconds, log_warnings
from hotlap.train.data.file_documents import LONGEST
from hotlap.train.data.sources import documents
from hotlap.train.data.splits import split_text

NANOGPT_FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
NANOGPT = (  # its README's command for computers without a GPU
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
)  # fmt: skip
HOTLAP = ("-m", "hotlap.cli", "pretrain", "--preset", "shakespeare-char")
TURNS = 2
SHAKESPEARE_LENGTH = 1_115_394  # characters of nanoGPT's own text, says its data/shakespeare_char/prepare.py
LEAST = 10_000  # characters; the tenth that validates must fill rows of both
LOSS = re.compile(r"\bval(?:idation_| )loss (\d+\.\d+)")
PROGRESS = re.compile(r"\bstep \d+[:/]")


def race(checkout: Path, data: str, out: Path | None) -> list[dict]:
    """Let both train in turns, write shakespeare-char.json and .csv, and return a row for each run.

    data: as PretrainConfig.data, but no token shards.
    """
    for name in NANOGPT_FILES:
        if not (checkout / name).is_file():
            raise FileNotFoundError(f"no {checkout / name}; is that a checkout of nanoGPT?")
    text = text_of(data)
    device = torch.device("cpu")
    path = results.open_file("shakespeare-char", out, device)
    about = {
        "what": description(checkout, len(text)),
        "commands": [" ".join(("python", *command)) for command in (NANOGPT, HOTLAP)],
        "text": {"name": data, "characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
    }
    log.info("%s", about["what"])
    log_warnings(device)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        copy, file = copy_of(checkout, Path(folder, "nanoGPT"), text), Path(folder, "text.txt")
        file.write_text(text, encoding="utf-8", newline="")
        for turn in range(1, TURNS + 1):
            ours = (*HOTLAP, "--data", str(file), "--out", f"{folder}/run-{turn}")
            runners = {"nanoGPT": (NANOGPT, copy), "hotlap": (ours, None)}
            found = {}
            for who in sorted(runners, reverse=turn % 2 == 0):  # each is first in half of the turns
                found[who] = run(f"turn {turn} of {TURNS}, {who}", *runners[who])
            for who, row in found.items():
                row["times_as_fast_as_peer"] = found["nanoGPT"]["seconds"] / row["seconds"]
                rows.append({"case": f"{len(text):,} characters, turn {turn}", "provider": who} | row)
                log.info("%s", results.as_line(rows[-1]))
            results.save(path, rows, device, warnings=warnings(rows), **about)
    log.info("written to %s", path)
    return rows


def warnings(rows: list[dict]) -> list[str]:
    """A line for each run beside which other processes were busy."""
    return [
        f"{row['case']}, {row['provider']}: other processes used {row['share_of_others']:.0%} of the CPUs"
        for row in rows
        if (row["share_of_others"] or 0) > BUSY
    ]


def text_of(data: str) -> str:
    """The text that a data string names. Of the plays, as much as nanoGPT's own text has."""
    text = "\n".join(documents(data)).replace("\r\n", "\n")[:LONGEST]  # as in any text file
    if data == "shakespeare":
        text = text[:SHAKESPEARE_LENGTH]
    if len(text) < LEAST:
        raise DataError(f"{data} has {len(text):,} characters; a race needs {LEAST:,}, so give a longer text")
    return text


def description(checkout: Path, characters: int) -> str:
    """What is measured, and on which characters each validates."""
    from hotlap.train.presets import shakespeare_char  # needs tiktoken, which other benchmarks do without

    return (
        "Whole commands, from start to end, in turns: the recipe for a CPU in the README of nanoGPT "
        f"({results.commit(checkout) or 'commit unknown'}), and hotlap pretrain --preset shakespeare-char. "
        f"Both train on the first 90 % of the same {characters:,} characters and validate on the other 10 %: "
        "nanoGPT on 240 rows of 64 at random places, hotlap on all of them in rows of "
        f"{shakespeare_char().model.context}. hotlap's time includes preparing the data, nanoGPT's does not."
    )


def copy_of(checkout: Path, folder: Path, text: str) -> Path:
    """A folder in which nanoGPT trains on a text: its files, and the data that its prepare.py would make."""
    for name in NANOGPT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, folder / name)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    train, held_out = split_text(text)
    for name, part in (("train", train), ("val", held_out)):
        np.array([ids[character] for character in part], dtype=np.uint16).tofile(data / f"{name}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def run(title: str, arguments: tuple[str, ...], folder: Path | None) -> dict[str, float | None]:
    """Run Python with these arguments and log its progress. Returns seconds, processor seconds, the share of
    the processors that others used (None if unknown), and the last validation loss that it printed.

    ValueError with its last lines if it fails.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    last: collections.deque[str] = collections.deque(maxlen=3)
    loss = None
    log.info("%s", title)
    used, machine, began = children_seconds(), cpu_seconds(), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        try:
            for line in filter(None, map(str.strip, process.stdout)):
                last.append(line)
                if match := LOSS.search(line):
                    loss = float(match[1])
                if PROGRESS.search(line):
                    log.info("%s: %s", title, line)
        except BaseException:
            process.kill()
            raise
    seconds, used = time.perf_counter() - began, children_seconds() - used
    if process.returncode or loss is None:
        fault = f"failed ({process.returncode})" if process.returncode else "printed no validation loss"
        raise ValueError(f"{title} {fault}: {' '.join(last)[-500:]}")
    others = None
    if machine:
        whole, busy = (after - before for after, before in zip(cpu_seconds(), machine, strict=True))
        others = max(0.0, busy - used) / whole
        if others > BUSY:
            log.warning("warning: %s: other processes used %.0f%% of the CPUs", title, 100 * others)
    return {"seconds": seconds, "processor_seconds": used, "share_of_others": others, "validation_loss": loss}


def children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    import resource  # which Windows has not

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

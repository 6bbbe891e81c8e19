"""Small texts, data and runs for tests of training."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from helpers.tools import tiny_config

from hotlap.model.tokenizer import SPECIAL_TOKENS
from hotlap.train.data.rows import Batch, PackedRows
from hotlap.train.data.shards import Documents
from hotlap.train.loop import LoopConfig
from hotlap.train.pretrain import PretrainConfig

MODEL = {"context": 32, "layers": 1, "width": 32, "heads": 1, "kv_heads": 1}
MODEL_FLAGS = [
    part for name, value in MODEL.items() for part in (f"--model.{name.replace('_', '-')}", str(value))
]


def write_text(path: Path, lines: int = 120) -> Path:
    """A text that a model can learn."""
    return write_whole(path, "".join(f"The square of {i} is {i * i}, and so on.\n" for i in range(lines)))


def write_whole(path: Path, text: str) -> Path:
    """Write a file atomically: several ranks may write it while another reads it."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text, "utf-8")
    return part.replace(path)


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_conversations(path: Path, count: int = 40) -> Path:
    """Questions in TRL's format, in characters that `write_text` has."""
    lines = [json.dumps({"messages": conversation(f"square of {i}", f"is {i * i}.")}) for i in range(count)]
    return write_whole(path, "\n".join(lines) + "\n")


def small_run(folder: Path, **fields) -> PretrainConfig:
    """Pretraining for 12 steps of 4 rows, saving every 3 steps. Writes its text, too."""
    config = PretrainConfig(
        out=folder / "run", data=str(write_text(folder / "text.txt")), tokenizer="characters",
        batch_rows=4, model=tiny_config(**MODEL), loop=LoopConfig(12, evaluate_every=6, save_every=3),
        dtype="float32", compile="off",
    )  # fmt: skip
    return dataclasses.replace(config, **fields)


def random_shards(lengths: list[list[int]], T: int, seed: int = 0, shuffle: bool = True) -> PackedRows:
    """Rows over shards in memory. Every token is unique, so that a row shows where it comes from."""
    shards, first = [], 0
    for shard in lengths:
        starts = np.cumsum([0, *shard[:-1]])
        documents = Documents(np.arange(first, first + sum(shard)), starts)
        shards.append(lambda documents=documents: documents)
        first += sum(shard)
    return PackedRows(shards, T, seed, shuffle)


def same(a: Batch, b: Batch) -> bool:
    names = ("inputs", "targets", "document_start")
    return a.weight == b.weight and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def special_text() -> str:
    return " ".join(SPECIAL_TOKENS)

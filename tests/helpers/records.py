"""A record of three short runs, made by the command, and what one can do to it."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.small_runs import MODEL
from helpers.tools import tiny_config

from hotlap.cli import main
from hotlap.train.data.sources import TEXTS
from hotlap.train.speedruns import minutes
from hotlap.train.speedruns.record_file import PROTOCOL, RECORD, content_sha256, statistics_of

CEILING = {"copy": 1e10, "matmul": 1e12, "dtype": "float32"}
CORPUS = tuple(
    f"The square of {i} is {i * i}, the cube is {i**3}, and {'abcdefghij'[i % 10]} is a letter.\n" * 2
    for i in range(150)
)
COMMAND = ["speedrun", "minutes", "--data", "pydocs", "--dtype", "float32", "--yes"]


@contextmanager
def small_race(ceilings: Callable = lambda world: dict(CEILING)):
    """Where `speedrun minutes` trains a model of one layer on a short text, which ends its runs."""
    timed = minutes.timed

    def small(*arguments):
        model = tiny_config(**MODEL, vocab_size=300)
        return dataclasses.replace(timed(*arguments), model=model, batch_rows=32, compile="off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXTS, "pydocs", lambda: CORPUS)
        patch.setattr(minutes, "timed", small)
        patch.setattr(minutes, "trial_flops", lambda world, dtype: 1e9)
        patch.setattr(minutes, "ceilings", ceilings)
        yield


def make_record(out: Path, *flags: str) -> Path:
    with small_race():
        assert main([*COMMAND, "--out", str(out), *flags]) == 0
    return out / RECORD


def invented_record(path: Path, mean: float = 1.4, device: str = "CPU, 2 threads", **fields) -> Path:
    """Write a record of three runs that nobody made, as far as its own numbers show."""
    runs = [
        {
            "seed": seed, "bpb": mean + spread, "seconds": 299.0, "tokens": 32 * 32 * 100, "steps": 100,
            "device": device, "ranks": 1, "weights_sha256": f"{seed}" * 64, "tokenizer_sha256": "a" * 64,
            "before": dict(CEILING), "after": dict(CEILING),
        }
        for seed, spread in enumerate((-0.002, 0.0, 0.002))
    ]  # fmt: skip
    model = dataclasses.asdict(tiny_config(**MODEL))
    config = {"model": model, "batch_rows": 32, "validation_tokens": 0, "dtype": "auto", "data": "pydocs"}
    record = {
        "protocol": PROTOCOL, "minutes": 5.0, "corpus": "pydocs", "config": config,
        "data": {"train_sha256": "b" * 64, "validation_sha256": "c" * 64},
        "code": {"sha256": "d" * 64, "commit": "0123456789"}, "versions": {}, "date": "2026-01-02 03:04 UTC",
        "runs": runs, **statistics_of([run["bpb"] for run in runs]), **fields,
    }  # fmt: skip
    path.write_text(json.dumps(record | {"sha256": content_sha256(record)}), encoding="utf-8")
    return path


def rewritten(path: Path, change: Callable[[dict], object], runs_too: bool = False) -> Path:
    """Change a record as a careful cheat does: its hash is made again, and what follows from its runs."""
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    if runs_too:
        record |= statistics_of([run["bpb"] for run in record["runs"]])
    record["sha256"] = content_sha256(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    return path

"""record.json: what a speedrun's runs reached, on which device, with which code and data, so that others can
check it (verify.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hotlap.common.checks import TOO_LARGE
from hotlap.common.code import code_sha256, commit
from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write_object
from hotlap.common.machine import now, versions
from hotlap.common.options import to_json
from hotlap.kernels.peaks import measure_ceilings
from hotlap.model.adapter_files import weights_sha256
from hotlap.model.tokenizer import TOKENIZER, Tokenizer
from hotlap.model.weights import run_checkpoints
from hotlap.train.config import PretrainConfig
from hotlap.train.distributed.world import World
from hotlap.train.run.folder import MACHINE
from hotlap.train.speedruns.corpora import shard_text, text_sha256, training_sha256

RECORD, CEILINGS = "record.json", "ceilings.json"
PROTOCOL = 1  # of the rules in docs/records.md; another one's records are not compared with these
MINUTES = 5.0
FEWEST_RUNS = 3  # for a row of the table
# Student's t for a two-sided interval of 95 %, by degrees of freedom, from 1
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip

CEILING = {"copy": float, "matmul": float, "dtype": str}
RUN = {
    "seed": int, "bpb": float, "seconds": float, "tokens": int, "steps": int, "device": str, "ranks": int,
    "weights_sha256": str, "tokenizer_sha256": str, "before": CEILING, "after": CEILING,
}  # fmt: skip
FIELDS = {
    "protocol": int, "minutes": float, "corpus": str,
    "config": {"model": dict, "batch_rows": int, "validation_tokens": int, "dtype": str, "data": str},
    "data": {"train_sha256": str, "validation_sha256": str},
    "code": {"sha256": str, "commit": str}, "versions": dict, "date": str, "runs": [RUN],
    "mean": float, "sigma": float | None, "interval": list | None, "sha256": str,
}  # fmt: skip


def ceilings(world: World) -> dict | None:
    """Bytes/s of a copy and FLOP/s of a matmul, on rank 0; None elsewhere, and where nothing can time them.

    On a CPU they count processor time, so that other programs change them little.
    """
    if not world.is_main or world.device.type not in ("cpu", "cuda"):
        return None
    found = measure_ceilings(world.device, time.process_time)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # the run measures how much memory is left
    return dataclasses.asdict(found)


def statistics_of(bpbs: Sequence[float]) -> dict:
    """Mean, standard deviation and 95 % interval of the mean; None of a single run."""
    mean, sigma, interval = statistics.fmean(bpbs), None, None
    if len(bpbs) > 1:
        sigma = statistics.stdev(bpbs)
        half = T_95[len(bpbs) - 2] * sigma / math.sqrt(len(bpbs))
        interval = [mean - half, mean + half]
    return {"mean": mean, "sigma": sigma, "interval": interval}


def run_entry(folder: Path, seed: int, last: dict[str, float]) -> dict:
    """What a finished run says of itself. last: the metrics of its last step."""
    checkpoint = run_checkpoints(folder)[-1]
    machine = read_object(folder / MACHINE)
    return {
        "seed": seed, "bpb": last["validation_bpb"], "seconds": last["seconds"], "tokens": last["tokens"],
        "steps": last["step"] + 1, "device": machine["device"], "ranks": machine["ranks"],
        "weights_sha256": weights_sha256([checkpoint]),
        "tokenizer_sha256": Tokenizer.load(checkpoint / TOKENIZER).sha256, **read_object(folder / CEILINGS),
    }  # fmt: skip


def write_record(out: Path, corpus: str, recipe: PretrainConfig, data: Path, runs: list[dict]) -> dict:
    """Write and return the record of runs of a recipe on a corpus. data: the folder of the shards."""
    tokenizer = Tokenizer.load(data / TOKENIZER)
    validation = shard_text(data, "validation", tokenizer, recipe.validation_tokens)
    config = json.loads(to_json(recipe))
    del config["out"]  # a path of somebody's machine
    fields = {
        "protocol": PROTOCOL, "minutes": recipe.loop.minutes, "corpus": corpus, "config": config,
        "data": {
            "train_sha256": training_sha256(corpus, data, tokenizer),
            "validation_sha256": text_sha256(validation),
        },
        "code": {"sha256": code_sha256(), "commit": commit()}, "versions": versions(), "date": now(),
        "runs": runs, **statistics_of([run["bpb"] for run in runs]),
    }  # fmt: skip
    record = fields | {"sha256": content_sha256(fields)}
    write_object(out / RECORD, record)
    return record


def summary(record: dict) -> str:
    """The result in a line."""
    text = f"{record['corpus']}, {record['minutes']:g} minutes: {record['mean']:.4f} bits per byte"
    if record["interval"]:
        half = (record["interval"][1] - record["interval"][0]) / 2
        text += f" ± {half:.4f} (95 %), mean of {len(record['runs'])} runs"
    return text


def content_sha256(fields: dict) -> str:
    """Of all fields but the hash itself, whatever their order and layout."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """The fields of a record. DataError if it is none, or of another protocol."""
    try:
        record = read_object(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no record at {path}; `hotlap speedrun minutes` writes one") from None
    except IsADirectoryError:
        raise FileNotFoundError(f"{path} is a folder; give the {RECORD} in it") from None
    protocol = record.get("protocol")
    if type(protocol) is int and protocol != PROTOCOL:
        raise DataError(
            f"{path} is a record of protocol {protocol}, and this version of hotlap checks protocol "
            f"{PROTOCOL}; use the version that wrote it"
        )
    check(record, FIELDS, f"{path}: ")
    return record


def check(value: object, kind: object, name: str) -> None:
    """DataError unless a value is of a kind: a type, an object with fields of some kinds, a list of one, or
    None. Numbers are from 0 to less than 2^63, and 3 is a float, too.
    """
    if isinstance(kind, dict):
        for field, of in kind.items():
            if not isinstance(value, dict) or field not in value:
                raise DataError(f"{name}no {field}; it is not what `hotlap speedrun minutes` writes")
            check(value[field], of, f"{name}{field} ")
    elif isinstance(kind, list):
        for i, item in enumerate(value if isinstance(value, list) else [None]):
            check(item, kind[0], f"{name}{i} ")
    else:
        kinds = (float | int) if kind is float else kind
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or (isinstance(value, int | float) and not 0 <= value < TOO_LARGE):
            raise DataError(f"{name}is {value!r:.40}; it is not what `hotlap speedrun minutes` writes")

"""`hotlap verify`: which claims of a speedrun's record hold.

First what the record alone shows, then the text on this machine, then each run: its checkpoint, which is
scored again, its metrics and its training text. The first claim that does not hold ends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from hotlap.common.code import code_sha256
from hotlap.common.errors import DataError
from hotlap.common.files import read_object
from hotlap.common.terminal import printable
from hotlap.model.adapter_files import weights_sha256
from hotlap.model.tokenizer import TOKENIZER, Tokenizer
from hotlap.model.weights import CHECKPOINTS, STATE, load_model, model_folder
from hotlap.train.data.sources import TEXTS
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import bits_per_byte, held_out_rows
from hotlap.train.evaluation.contamination import seen_share
from hotlap.train.run.folder import MACHINE, run_of
from hotlap.train.run.metrics import METRICS, number, read_metrics
from hotlap.train.speedruns.config import VerifyConfig
from hotlap.train.speedruns.corpora import (
    corpus_text,
    loses_text,
    shard_text,
    text_sha256,
    training_sha256,
)
from hotlap.train.speedruns.record_claims import CLAIMS, close, lacks
from hotlap.train.speedruns.record_file import CEILINGS, read_record, summary

# Kernels, dtypes and devices round otherwise: the demo's model in float32 and bfloat16 differs by 0.00006.
SAME_BITS = 0.0005
# Of the runs of 13 words in the validation text, the training text naturally holds: pydocs 18 %, docs 7 %,
# bigbench 5 %, shakespeare none. A model that was trained on the validation text has seen all.
SEEN = 0.3

HOLDS, DIFFERS, LEFT = "holds", "differs", "not checked"
Claim = tuple[str, str]  # one of these; what it is about, in words


def verify(config: VerifyConfig) -> tuple[dict, list[str]]:
    """Print the claims. Returns the record, and what cannot be checked here. DataError says what does not
    hold.
    """
    record, left = read_record(config.record), []
    try:
        with joined() as world:
            for found, words in claims(record, config, world):
                print(printable(f"{found}: {words}"), flush=True)
                if found == LEFT:
                    left.append(words)
    except DataError as error:
        raise DataError(f"{config.record}: {error}") from error
    return record, left


def claims(record: dict, config: VerifyConfig, world: World) -> Iterator[Claim]:
    for claim in CLAIMS:
        yield HOLDS, claim(record)
    same = record["code"]["sha256"] == code_sha256()
    written = record["code"]["commit"] or "an installed version"
    yield (HOLDS, "the code that trains is this one") if same else (DIFFERS, f"the code: it was {written}")
    corpus, documents, known = record["corpus"], [], False
    try:
        documents = list(validation_text(record))
    except FileNotFoundError as error:
        yield LEFT, f"the text of {corpus} is not on this machine: {error}"
    else:
        known = text_sha256(documents) == record["data"]["validation_sha256"]
        other = f"this machine's {corpus} is another text than the record's{python_of(record)}"
        yield (HOLDS, f"the validation text is that of {corpus} here") if known else (LEFT, other)
    found = list(checkpoints(record, config))
    for checkpoint, run in found:
        yield from run_claims(checkpoint, run, record)
        if known:
            yield HOLDS, same_bits(checkpoint, run, record, documents, world)
            yield unseen_text(run_of(checkpoint), record, documents)
    if missing := len(record["runs"]) - len(found):
        yield LEFT, f"the checkpoints of {missing} of {len(record['runs'])} runs are not here"


def validation_text(record: dict) -> Iterator[bytes]:
    """The documents that validate, from this machine."""
    if record["corpus"] in TEXTS:
        return corpus_text(record["corpus"], "validation")
    folder = Path(record["config"]["data"])
    limit = record["config"]["validation_tokens"]
    return shard_text(folder, "validation", Tokenizer.load(folder / TOKENIZER), limit)


def python_of(record: dict) -> str:
    """pydocs is the documentation of the Python that runs."""
    return f", which is of Python {record['versions'].get('python')}" if record["corpus"] == "pydocs" else ""


def checkpoints(record: dict, config: VerifyConfig) -> Iterator[tuple[Path, dict]]:
    """The model directories that are here, each with its run in the record: in config.checkpoint, or beside
    the record. DataError for another model.
    """
    place = config.checkpoint or config.record.parent
    several = [path for path in sorted(place.glob("run-*")) if (path / CHECKPOINTS).is_dir()]
    if not config.checkpoint and not several and not (place / CHECKPOINTS).is_dir():
        return
    runs = {run["weights_sha256"]: run for run in record["runs"]}
    for folder in map(model_folder, several or [place]):
        sha256 = weights_sha256([folder])
        if sha256 not in runs:
            raise DataError(f"{folder} is another checkpoint: weights of sha256 {sha256[:12]}...")
        yield folder, runs.pop(sha256)


def run_claims(checkpoint: Path, run: dict, record: dict) -> Iterator[Claim]:
    """The checkpoint is the run's, and so are its steps, tokens and seconds."""
    if Tokenizer.load(checkpoint / TOKENIZER).sha256 != run["tokenizer_sha256"]:
        raise DataError(f"{checkpoint} has another tokenizer than the run with seed {run['seed']}")
    yield HOLDS, f"{checkpoint} has the weights and the tokenizer of the run with seed {run['seed']}"
    lines = read_metrics(run_of(checkpoint) / METRICS)
    if not (checkpoint / STATE).is_file() or not lines:
        yield LEFT, "its steps, tokens and seconds: the rest of the run is not here"
        return
    state = read_object(checkpoint / STATE)
    for name, said in (("step", run["steps"]), ("tokens", run["tokens"]), ("seconds", run["seconds"])):
        if not close(said, state.get(name)):
            raise DataError(f"{checkpoint / STATE} says {name} {state.get(name)}, and the record {said}")
    check_metrics(lines, run, run_of(checkpoint) / METRICS)
    for name in (MACHINE, CEILINGS):
        found = read_object(run_of(checkpoint) / name)
        for field in {*found} & {*run}:
            if found[field] != run[field]:
                raise DataError(f"{run_of(checkpoint) / name} says another {field} than the record")
    yield HOLDS, "its steps, tokens, seconds and device are those that checkpoint, metrics and machine say"


def check_metrics(lines: list[dict], run: dict, path: Path) -> None:
    """DataError unless the lines of metrics.jsonl add up to the run: each step's tokens took its seconds."""
    tokens = seconds = 0.0
    for step, line in enumerate(lines):
        done, took, speed = (number(line, name) or 0.0 for name in ("tokens", "seconds", "tokens_per_second"))
        fits = math.isclose((took - seconds) * speed, done - tokens, rel_tol=1e-6)
        if line["step"] != step or not took > seconds or not fits:
            raise DataError(f"{path}: line {step + 1} does not follow from the one before it")
        tokens, seconds = done, took
    last = lines[-1]
    said = {"step": run["steps"] - 1, "tokens": run["tokens"], "seconds": run["seconds"]}
    for name, value in {**said, "validation_bpb": run["bpb"]}.items():
        if not close(value, last.get(name)):
            raise DataError(f"{path} ends with {name} {last.get(name)}, and the record says {value}")


def same_bits(checkpoint: Path, run: dict, record: dict, documents: list[bytes], world: World) -> str:
    """The checkpoint's bits per byte of the validation text, computed again, are the record's."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(record["config"]["dtype"])
    model, tokenizer = load_model(checkpoint, world.device, dtype)  # None: the fastest here, as auto means
    if loses_text(tokenizer, documents, record["data"]["validation_sha256"]):
        raise DataError(f"the tokenizer of {checkpoint} loses a part of the validation text")
    source = record["corpus"] if record["corpus"] in TEXTS else record["config"]["data"]
    limit = record["config"]["validation_tokens"]
    rows = held_out_rows(source, tokenizer, model.config.context, limit)
    bpb = bits_per_byte(model, rows, tokenizer, world)["bpb"]
    if abs(bpb - run["bpb"]) > SAME_BITS:
        raise DataError(f"{checkpoint} has {bpb:.4f} bits per byte, and the record says {run['bpb']:.4f}")
    return f"{bpb:.4f} bits per byte, scored again (the record: {run['bpb']:.4f})"


def unseen_text(run: Path, record: dict, documents: list[bytes]) -> Claim:
    """The run's training text is the corpus's, and does not hold what it is validated on."""
    corpus, said = record["corpus"], record["data"]["train_sha256"]
    folder = run / "data" if corpus in TEXTS else Path(record["config"]["data"])
    if not folder.is_dir():
        return LEFT, f"its training text is not in {folder}"
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if corpus not in TEXTS:  # too large to compare
        same = training_sha256(corpus, folder, tokenizer) == said
        return (HOLDS if same else LEFT), f"its training shards are those in {folder}"
    trained = list(shard_text(folder, "train", tokenizer))
    share = seen_share([d.decode() for d in documents], (d.decode(errors="replace") for d in trained))
    if share > SEEN:
        raise DataError(
            f"{run} was trained on its validation text: {share:.0%} of the runs of 13 words are in both"
        )
    if text_sha256(trained) != said:
        raise DataError(f"{run} was trained on another text than the record says")
    if text_sha256(corpus_text(corpus, "train")) != said:
        return LEFT, f"its training text: this machine's {corpus} is another{python_of(record)}"
    return HOLDS, f"it was trained on {corpus}, with {share:.0%} of the validation text's runs of 13 words"


def main(config: VerifyConfig) -> None:
    """`hotlap verify`."""
    record, left = verify(config)
    print(summary(record) + (f"; {len(left)} of its claims cannot be checked here" if left else ""))
    if lacking := lacks(record["minutes"], len(record["runs"])):
        print(f"no row of the table: {lacking}")

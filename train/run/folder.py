"""A run's directory: its lock, its configuration and its machine."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.files import naming
from hotlap.common.locks import lock
from hotlap.common.machine import circumstances
from hotlap.common.options import to_json
from hotlap.model.tensors import listed
from hotlap.model.weights import CONFIG, TOKENIZER, run_checkpoints
from hotlap.train.run.changes import ADAPTERS, LENGTH, ORDER, changes
from hotlap.train.run.metrics import METRICS

LOCK = "run.lock"
MACHINE = "machine.json"
MADE = (TOKENIZER, "pairs.jsonl", "reference.npz")  # by stages, before the first step


@contextmanager
def run_lock(run: Path):
    """Lock the run's directory, or raise ValueError naming the process that holds the lock."""
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--out {run} is not UTF-8, and safetensors could not read its checkpoints"
        ) from None
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(
            f"{run} cannot be a run's directory ({error.strerror}); choose another"
        ) from None
    try:
        file = open(run / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed below
    except OSError as error:
        raise FileExistsError(f"cannot lock {run}: {LOCK} cannot be opened ({error.strerror})") from None
    with file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).split())
            raise ValueError(f"{run} is in use by {holder or 'another process'}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        with naming(run / LOCK):
            file.flush()
        yield


def open_run(run: Path, config: Any, resume: bool) -> None:
    """Start a new run, or check that a resumed run has its original configuration, but for its length.

    Raises FileExistsError if the folder holds a run that is not being resumed, or anything else: nothing is
    overwritten. A run that failed before its first step is started afresh.
    """
    path = run / CONFIG
    if not path.exists():
        if run_checkpoints(run):
            raise FileExistsError(f"{run} has checkpoints, but no {CONFIG}; {in_new_folder(run)}")
        if others := sorted(p.name for p in run.iterdir() if p.name != LOCK):
            raise FileExistsError(f"{run} holds {others[0]} and no run; choose a new folder with --out")
        write_config(run, config)
        return
    saved = read_config(run)
    started = (run / METRICS).exists() or bool(run_checkpoints(run))
    if started and not resume:
        raise FileExistsError(
            f"{run} already holds a run; resume it with --resume auto, or choose another --out"
        )
    if not started and set(saved) != set(json.loads(to_json(config))):
        raise FileExistsError(f"{run} already holds a run or model of another kind; choose another --out")
    changed = changes(saved, config)
    if resume and started:
        if texts := [text for name, text in changed.items() if name not in LENGTH]:
            fixed = (ADAPTERS | ORDER) & set(changed)  # no checkpoint goes on with others
            instead = "start a new run with another --out" if fixed else in_new_folder(run)
            raise ValueError(
                f"{run} was started with another configuration: {listed(texts)}; restore the original "
                f"values, or {instead}"
            )
    elif changed or not resume:
        for made in (*run.glob("data/*.bin"), run / "data" / TOKENIZER, *(run / name for name in MADE)):
            made.unlink(missing_ok=True)  # left by the failed start
        write_config(run, dataclasses.replace(config, resume=origin(run, config.resume)))


def origin(run: Path, choice: str) -> str:
    """What --resume means in an opened run: `auto` in one that has no checkpoint of its own yet, but was
    started from another run's, is that one.
    """
    if choice == "auto" and not run_checkpoints(run):
        saved = read_config(run).get("resume")
        if isinstance(saved, str) and saved != "no":
            return saved
    return choice


def in_new_folder(run: Path) -> str:
    return f"choose another --out, with --resume {run} to go on from its checkpoint"


def read_config(run: Path) -> dict:
    """The fields in a run's config.json. DataError if it cannot be read."""
    try:
        fields = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{fields!r:.40} is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{run / CONFIG} is not a run's configuration: {error}; {in_new_folder(run)}"
        ) from error
    return fields


def write_config(run: Path, config: Any) -> None:
    files.write(run / CONFIG, to_json(config))


def write_machine(run: Path, device: torch.device, ranks: int) -> None:
    """Record the device, versions and date of a start that trains; the last one counts."""
    files.write_object(run / MACHINE, {**circumstances(device), "ranks": ranks})


def read_machine(run: Path) -> tuple[str, str]:
    """The device, with the number of ranks, and the date of a run's last start; empty if they are unknown."""
    try:
        found = json.loads((run / MACHINE).read_text(encoding="utf-8"))
        several = f"{found['ranks']} x " if found["ranks"] > 1 else ""
        return f"{several}{found['device']}", str(found["date"])
    except (OSError, ValueError, LookupError, TypeError):
        return "", ""


def read_machines(runs: Iterable[Path]) -> tuple[str, str]:
    """The devices of several runs, each named once, and the date of the latest start."""
    devices, dates = zip(*map(read_machine, runs), strict=True)
    return " and ".join(dict.fromkeys(filter(None, devices))), max(dates)


def run_of(folder: Path) -> Path:
    """The run of one of its checkpoints; another model's directory itself."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def base_of(run: Path, config: dict) -> Path:
    """Where the base is that a run's configuration names, from the current folder or the one that it was
    trained in, as far as --out tells; it may be gone.
    """
    base, out, place = Path(config["base"]), Path(config["out"]), run.resolve()
    moved = not (base.is_absolute() or out.is_absolute() or run_of(base).exists())
    if moved and place.parts[-len(out.parts) :] == out.parts:
        return Path(*place.parts[: -len(out.parts)]) / base
    return base

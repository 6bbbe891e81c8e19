"""A run's directory: one owner at a time, its configuration, and where to go on."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hotlap.kernels.dispatch import fast_dtype
from hotlap.kernels.fp8 import check_fp8
from hotlap.model.errors import DataError
from hotlap.model.gpt import GPT
from hotlap.model.weights import MANIFEST, TOKENIZER, run_checkpoints
from hotlap.train.checkpoint import load_checkpoint, remove_unfinished
from hotlap.train.log import log
from hotlap.train.optim import MuonAdamW
from hotlap.train.options import differences, to_json

CONFIG, METRICS = "config.json", "metrics.jsonl"
LOCK = "run.lock"
CHANGEABLE = {"resume", "compile", "run", "micro_batch", "recompute"}  # what may differ when a run goes on


@contextmanager
def run_lock(run: Path):
    """Own the run's directory, or raise ValueError naming who does."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"{run} cannot be a run's directory ({error.strerror}); name another") from None
    with open(run / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{run} is in use by {file.read().strip() or 'another process'}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def open_run(run: Path, config: Any, resume: bool) -> None:
    """Start a new run, or check that a resumed one has the configuration that it was started with.

    FileExistsError for a folder that holds a run, or anything else, and is not to be resumed: nothing in it
    is overwritten. A run that failed before its first step is started anew.
    """
    path, text = run / CONFIG, to_json(config)
    if not path.exists():
        if others := sorted(p.name for p in run.iterdir() if p.name != LOCK):
            raise FileExistsError(f"{run} holds {others[0]} and no run; name a new folder by --run")
        path.write_text(text, encoding="utf-8")
        return
    try:
        saved, current = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        ours = set(saved) == set(current)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a run's configuration: {error}") from error
    if not resume:
        if (run / METRICS).exists() or not ours:
            raise FileExistsError(
                f"{run} holds a run already; go on with it by --resume, or name another by --run"
            )
        for made in (*run.glob("data/*.bin"), run / "data" / TOKENIZER, run / TOKENIZER):
            made.unlink(missing_ok=True)  # from what the failed start named
        path.write_text(text, encoding="utf-8")
        return
    for name in CHANGEABLE:
        saved.pop(name, None)
        current.pop(name, None)
    if changed := differences(saved, current):
        raise ValueError(
            f"{run} was started with another configuration: {'; '.join(changed)}; "
            "name another run, or give the values that it was started with"
        )


def resume_from(run: Path, model: GPT, optimizer: MuonAdamW) -> tuple[int, dict]:
    """Load the newest checkpoint that is whole, and return its step and state; step 0 where there is none.

    Newer ones that are damaged lose their name as a checkpoint, so that the run writes them again.
    """
    remove_unfinished(run)
    refused: list[Path] = []
    for folder in reversed(run_checkpoints(run)):
        try:
            state = load_checkpoint(folder, model, optimizer)
        except DataError as error:
            log.warning("%s; trying the checkpoint before it", error)
            refused.append(folder)
            continue
        for damaged in refused:
            (damaged / MANIFEST).rename(damaged / "manifest.damaged.json")
        log.info("%s: going on after step %d", run, state["step"])
        return state.pop("step"), state
    if refused:
        raise DataError(f"no checkpoint of {run} can be used ({len(refused)} are damaged); start another run")
    return 0, {}


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of everything but fp8's products; a ValueError for fp8 on a device without."""
    if choice == "fp8":
        check_fp8(device)
        return torch.bfloat16
    return fast_dtype(device.type) if choice == "auto" else getattr(torch, choice)


def use_fp8(model: GPT, dtype: str) -> None:
    """Train in fp8 what is large enough for it, where it is asked for."""
    if dtype == "fp8" and not model.use_fp8():
        log.warning("fp8: no layer is large enough for it to pay; computing in bfloat16")

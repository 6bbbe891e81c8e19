"""A run's directory: its lock and its configuration."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hotlap.common.errors import DataError
from hotlap.common.files import naming, write
from hotlap.common.options import differences, flat, to_json
from hotlap.model.weights import TOKENIZER
from hotlap.train.run.metrics import METRICS

CONFIG = "config.json"
LOCK = "run.lock"
# Fields that may change when a run is resumed.
CHANGEABLE = {"resume", "compile", "out", "micro_batch", "recompute", "profile"}


@contextmanager
def run_lock(run: Path):
    """Lock the run's directory, or raise ValueError naming the process that holds the lock."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(
            f"{run} cannot be a run's directory ({error.strerror}); choose another"
        ) from None
    with open(run / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{run} is in use by {file.read().strip() or 'another process'}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        with naming(run / LOCK):
            file.flush()
        yield


def open_run(run: Path, config: Any, resume: bool) -> None:
    """Start a new run, or check that a resumed run has its original configuration.

    Raises FileExistsError if the folder holds a run that is not being resumed, or anything else: nothing is
    overwritten. A run that failed before its first step is started afresh.
    """
    path, text = run / CONFIG, to_json(config)
    if not path.exists():
        if others := sorted(p.name for p in run.iterdir() if p.name != LOCK):
            raise FileExistsError(f"{run} holds {others[0]} and no run; choose a new folder with --out")
        write(path, text)
        return
    try:
        saved, current = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        ours = set(saved) == set(current)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a run's configuration: {error}") from error
    if not resume:
        if (run / METRICS).exists() or not ours:
            raise FileExistsError(
                f"{run} already holds a run; resume it with --resume auto, or choose another --out"
            )
        for made in (*run.glob("data/*.bin"), run / "data" / TOKENIZER, run / TOKENIZER):
            made.unlink(missing_ok=True)  # left by the failed start
        write(path, text)
        return
    saved = flat(json.loads(to_json(type(config)()))) | flat(
        saved
    )  # fields newer than the run: their defaults
    current = flat(current)
    for name in CHANGEABLE:
        saved.pop(name, None)
        current.pop(name, None)
    if changed := differences(saved, current):
        raise ValueError(
            f"{run} was started with another configuration: {'; '.join(changed)}; "
            "choose another --out, or restore the original values"
        )

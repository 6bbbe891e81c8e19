"""A run's directory: its lock, its configuration, and where to resume."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.options import differences, to_json
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, model_folder, run_checkpoints
from hotlap.train.distributed.world import World
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.run.checkpoint import load_checkpoint, remove_unfinished, set_aside, verify_checkpoint
from hotlap.train.run.metrics import METRICS
from hotlap.train.run.state import RunState

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
                f"{run} already holds a run; resume it with --resume auto, or choose another --out"
            )
        for made in (*run.glob("data/*.bin"), run / "data" / TOKENIZER, run / TOKENIZER):
            made.unlink(missing_ok=True)  # left by the failed start
        path.write_text(text, encoding="utf-8")
        return
    for name in CHANGEABLE:
        saved.pop(name, None)
        current.pop(name, None)
    if changed := differences(saved, current):
        raise ValueError(
            f"{run} was started with another configuration: {'; '.join(changed)}; "
            "choose another --out, or restore the original values"
        )


def resume_from(run: Path, choice: str, model: GPT, optimizer: MuonAdamW, world: World) -> RunState:
    """Load a checkpoint on all ranks and return its state, or the state of a new run.

    choice: "no"; "auto", the run's newest intact checkpoint, if it has any; or the path of a checkpoint or
    run, which is loaded or refused, never replaced by another. Damaged or later checkpoints of the run are
    renamed to aside-step-..., so that the run writes them again.
    """
    if world.leads:
        remove_unfinished(run)
    found = world.together(lambda: run_checkpoints(run))[0]
    if choice == "no":
        if found:
            raise FileExistsError(
                f"{run} already holds checkpoints; resume with --resume auto, or choose another --out"
            )
        return RunState()
    if choice == "auto":
        folder, manifest = newest_whole(found, world)
        if folder is None:
            return RunState()
    else:
        folder = world.together(lambda: model_folder(choice))[0]
        manifest = verify_checkpoint(folder, world)
    same_tokenizer(run, folder, manifest)
    state = load_checkpoint(folder, manifest, model, optimizer, world)
    if world.leads:
        for later in found:
            if int(later.name.removeprefix("step-")) >= state.step and not later.samefile(folder):
                log.warning("%s is renamed to %s", later, set_aside(later).name)
    log.info("%s: resuming after step %d from %s", run, state.step, folder)
    return state


def newest_whole(found: list[Path], world: World) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its manifest. Raises DataError if all are damaged."""
    for folder in reversed(found):
        try:
            return folder, verify_checkpoint(folder, world)
        except DataError as error:
            log.warning("%s; trying the previous checkpoint", error)
    if found:
        raise DataError(f"all checkpoints in {found[-1].parent} are damaged; start a new run")
    return None, {}


def same_tokenizer(run: Path, folder: Path, manifest: dict) -> None:
    """Raise DataError if the run and the checkpoint have different tokenizers."""
    if (run / TOKENIZER).exists():
        current = Tokenizer.load(run / TOKENIZER).sha256
        if current != manifest["tokenizer"]:
            raise DataError(
                f"{folder} has another tokenizer: saved sha256 {manifest['tokenizer'][:12]}..., current "
                f"{current[:12]}..."
            )

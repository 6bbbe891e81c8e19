"""A run's directory: one owner at a time, its configuration, and where to go on."""

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
# What may differ when a run is resumed.
CHANGEABLE = {"resume", "compile", "out", "micro_batch", "recompute", "profile"}


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
            raise FileExistsError(f"{run} holds {others[0]} and no run; name a new folder by --out")
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
                f"{run} holds a run already; go on with it by --resume auto, or name another by --out"
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


def resume_from(run: Path, choice: str, model: GPT, optimizer: MuonAdamW, world: World) -> RunState:
    """Load the checkpoint that `choice` means on every rank, and return its state; or that of a new run.

    choice: "no"; "auto", the run's newest that is whole, or none where there is none yet; or the path of a
    checkpoint or run, which is taken as it is, or refused. Checkpoints of the run that are damaged, or later
    than the chosen one, lose their name as such (aside-step-...), so that the run writes them anew.
    """
    if world.leads:
        remove_unfinished(run)
    found = world.together(lambda: run_checkpoints(run))[0]
    if choice == "no":
        if found:
            raise FileExistsError(
                f"{run} holds checkpoints already; go on by --resume auto, or name another --out"
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
                log.warning("%s is set aside as %s", later, set_aside(later).name)
    log.info("%s: resuming after step %d, from %s", run, state.step, folder)
    return state


def newest_whole(found: list[Path], world: World) -> tuple[Path | None, dict]:
    """The newest checkpoint that is not damaged, and its manifest. DataError where all are."""
    for folder in reversed(found):
        try:
            return folder, verify_checkpoint(folder, world)
        except DataError as error:
            log.warning("%s; trying the checkpoint before it", error)
    if found:
        raise DataError(f"all checkpoints in {found[-1].parent} are damaged; start another run")
    return None, {}


def same_tokenizer(run: Path, folder: Path, manifest: dict) -> None:
    """DataError where the run has another tokenizer than the checkpoint that it is to go on from."""
    if (run / TOKENIZER).exists():
        current = Tokenizer.load(run / TOKENIZER).sha256
        if current != manifest["tokenizer"]:
            raise DataError(
                f"{folder} is of another tokenizer: saved sha256 {manifest['tokenizer'][:12]}..., current "
                f"{current[:12]}..."
            )

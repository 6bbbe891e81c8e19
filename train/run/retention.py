"""Which of a run's checkpoints are kept: the newest, the best, and those that adapters need.

The best has the highest `validation_reward`, or else the lowest `validation_loss`, of all that the folder has
had. It is named in best.json.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import write
from hotlap.common.log import log
from hotlap.model.weights import BEST, CHECKPOINTS, best_checkpoint, read_best, run_checkpoints
from hotlap.train.run.metrics import number

KEEP = 2  # newest checkpoints
NEEDED = "needed_by.txt"  # in a checkpoint: runs with adapters for it


def score(metrics: dict) -> float | None:
    """How good a validation is: higher is better. None if there was none, or nothing finite came of it."""
    loss = number(metrics, "validation_loss")
    return number(metrics, "validation_reward") if loss is None else -loss


def best_score(run: Path) -> float | None:
    """The score of the run's best checkpoint; None if it has none any more."""
    try:
        return score(read_best(run)) if best_checkpoint(run) else None
    except DataError as error:
        log.warning("%s; the next validation is the best", error)
        return None


def name_best(run: Path, step: int, metrics: dict) -> None:
    """Write best.json, when the checkpoint of that step is complete."""
    found = {k: v for k, v in metrics.items() if k in ("validation_loss", "validation_reward")}
    write(run / BEST, json.dumps({"step": step, **found}) + "\n")


def retire(run: Path, before_each_deletion: Callable[[], None]) -> None:
    """Delete the checkpoints that are not kept."""
    best = best_checkpoint(run)
    for old in run_checkpoints(run)[:-KEEP]:
        if old == best or (old / NEEDED).exists():
            continue
        # a half-deleted one must not count as a checkpoint
        gone = old.rename(old.with_name(f".tmp-{old.name}-{secrets.token_hex(4)}"))
        before_each_deletion()
        shutil.rmtree(gone)


def mark_needed(base: Path, run: Path) -> None:
    """Note in a checkpoint that the adapters of a run need it: its own run, trained on, would delete it."""
    path, line = base / NEEDED, f"{run.resolve()}\n"
    if base.parent.name != CHECKPOINTS:
        return
    try:
        with open(path, "a+", encoding="utf-8", errors="surrogateescape") as file:
            file.seek(0)
            if line not in file.readlines():
                file.write(line)
    except OSError as error:
        log.warning(
            "%s cannot be marked as needed (%s): train that run on into another --out, or it deletes it",
            base, error.strerror,
        )  # fmt: skip


def move_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one, and return its new path."""
    return folder.rename(folder.with_name(f"aside-{folder.name}-{secrets.token_hex(4)}"))

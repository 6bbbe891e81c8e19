"""Save to a disk that is full, and print the errors as JSON. test_full_disk.py runs it on a small disk."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.checkpoints import load_newest, save_steps
from helpers.small_runs import MODEL_FLAGS, write_text

from hotlap.cli import main
from hotlap.train.distributed.world import joined
from hotlap.train.run import checkpoint


def message(world, run: Path, step: int) -> str:
    try:
        save_steps(world, run, (step,))
    except OSError as error:
        return str(error)
    raise AssertionError("the disk was not full")


def report(disk: Path) -> dict:
    with joined() as world:
        run = disk / "saved"
        held = save_steps(world, run, (1,))
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        said = {"before": message(world, run, 2)}
        with mock.patch.object(checkpoint, "require_space"):  # as if the disk filled up after the check
            said["while writing"] = message(world, run, 3)
        said["left"] = sorted(p.name for p in (run / "checkpoints").iterdir())
        step, found = load_newest(world, run)
        said["loaded"] = [step, found == held[1]]
    write_text(disk / "text.txt", lines=10)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        small = ["--tokenizer", "characters", "--dtype", "float32", "--batch-rows", "1", "--loop.steps", "2"]
        said["exit code"] = main(
            ["pretrain", "--data", str(disk / "text.txt"), "--out", str(disk / "run"), *small, *MODEL_FLAGS]
        )
    said["command"] = errors.getvalue().splitlines()[-1]
    metrics = disk / "run" / "metrics.jsonl"
    said["steps"] = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    return said


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))

"""Save to a disk that is full, and print the errors as JSON. test_full_disk.py runs it on a small disk."""

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.checkpoints import load_newest, save_steps
from helpers.small_runs import MODEL_FLAGS, write_text
from helpers.tools import tiny_config, train_tiny_tokenizer

from hotlap.bench import results
from hotlap.cli import main
from hotlap.common import files
from hotlap.common.errors import guarded
from hotlap.common.plots import new_figure, save_figure
from hotlap.model.gpt import GPT
from hotlap.model.weights import save_model
from hotlap.train.distributed.world import joined
from hotlap.train.run import checkpoint


def message(world, run: Path, step: int) -> str:
    try:
        save_steps(world, run, (step,))
    except OSError as error:
        return str(error)
    raise AssertionError("the disk was not full")


WRITERS = (  # a file or folder of a full disk, and the command or function that writes there
    ("tokenizer.json", ["tokenizer", "--source", "FROM/text.txt", "--vocab-size", "300", "--out"]),
    ("shards", ["data", "--source", "FROM/text.txt", "--tokenizer", "FROM/model/tokenizer.json", "--out"]),
    ("exported", ["export", "weights", "--model", "FROM/model", "--out"]),
    ("for_transformers", ["export", "hf", "FROM/model", "--out"]),
    ("scores.json", ["eval", "--model", "FROM/model", "--tasks", "samples", "--out"]),
    ("talk.jsonl", lambda path: files.append(path, "x" * 4096)),
    ("curves.png", lambda path: save_figure(new_figure(), path)),
    ("results.json", lambda path: results.save(path, [{"case": "a" * 4096}], torch.device("cpu"))),
)


def fails(folder: Path, elsewhere: Path, name: str, write: list[str] | Callable) -> dict:
    """What a writer says on a disk without a free byte, and what it leaves there."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        if callable(write):
            code = guarded(lambda: write(folder / name), False)
        else:
            words = [word.replace("FROM", str(elsewhere)) for word in write]
            code = main([*words, str(folder / name)])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {"name": name, "code": code, "said": errors.getvalue().splitlines()[-1], "left": left}


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
    (disk / "full").mkdir()
    (disk / "rest").write_bytes(bytes(shutil.disk_usage(disk).free))
    with tempfile.TemporaryDirectory() as elsewhere:
        write_text(Path(elsewhere, "text.txt"))
        Path(elsewhere, "model").mkdir()
        save_model(Path(elsewhere, "model"), GPT(tiny_config()).init_weights(), train_tiny_tokenizer())
        said["writers"] = [fails(disk / "full", Path(elsewhere), *writer) for writer in WRITERS]
    (disk / "rest").unlink()
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

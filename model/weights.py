"""Model directories: config.json, tokenizer.json and model.safetensors. Nothing in them can run code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hotlap.model.config import GPTConfig
from hotlap.model.errors import DataError
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write the three files into an existing folder."""
    config = json.dumps(dataclasses.asdict(model.config), indent=1)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)


def load_model(path: str | Path, device: torch.device, compute_dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a model directory, or of the newest checkpoint of a run."""
    folder = model_folder(path)
    if (folder / MANIFEST).is_file():  # a model directory from elsewhere has no hashes to check
        verify(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    config = load_config(folder)
    if config.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}; "
            "they are not of one run"
        )
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.to_empty(device=device).init_weights()  # for the tables that are not stored
    load_weights(model, folder / WEIGHTS)
    return model.eval(), tokenizer


def load_config(folder: Path) -> GPTConfig:
    try:
        return GPTConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / CONFIG} is not a model's configuration: {error}") from error


def load_weights(model: GPT, path: Path) -> None:
    """Fill the model from a file whose names, shapes and dtypes must be the model's; nothing is cast."""
    load_tensors(path, model.state_dict())


def load_tensors(path: Path, into: dict[str, torch.Tensor]) -> None:
    """Copy a safetensors file into tensors, which must match it in names, shapes and dtypes."""
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if set(saved) != set(into):
        name = sorted(set(saved) ^ set(into))[0]
        where = "in the file but not in the model" if name in saved else "missing from the file"
        raise DataError(f"{path}: tensor {name!r} is {where}")
    for name, tensor in into.items():
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise DataError(
                f"{path}: {name} is {list(saved[name].shape)} {saved[name].dtype}, "
                f"the model's is {list(tensor.shape)} {tensor.dtype}"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def verify(folder: Path) -> None:
    """Check every file against the manifest's size and hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error!r}); use another checkpoint") from error
    if version != FORMAT:
        raise DataError(f"{folder} has checkpoint format {version}; this version reads {FORMAT}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is missing or not {size} bytes; use another checkpoint")
        if file_sha256(path) != digest:
            raise DataError(f"{path} has changed since it was saved; use another checkpoint")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_folder(path: str | Path) -> Path:
    """The model directory that a path means: itself, or the newest checkpoint in a run."""
    path = Path(path)
    if is_model(path):
        return path
    if checkpoints := run_checkpoints(path):
        return checkpoints[-1]
    found = find_models(Path("runs"))
    hint = (
        f"found: {', '.join(map(str, found))}"
        if found
        else "none found under runs/; train one with `make demo`"
    )
    raise FileNotFoundError(f"no model at {path}; {hint}")


def is_model(path: Path) -> bool:
    return all((path / name).is_file() for name in (CONFIG, TOKENIZER, WEIGHTS))


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. One without a manifest was never finished."""
    found = (run / "checkpoints").glob("step-" + "[0-9]" * 6 + "*")
    whole = [p for p in found if (p / MANIFEST).is_file()]
    return sorted(whole, key=lambda p: int(p.name.removeprefix("step-")))


def find_models(root: Path) -> list[Path]:
    """Runs and model directories under root, newest last."""
    found = []
    for folder, names, files in os.walk(root):
        if (WEIGHTS in files and not Path(folder).name.startswith("step-")) or (
            "checkpoints" in names and run_checkpoints(Path(folder))
        ):
            found.append(Path(folder))
        names[:] = [n for n in names if n != "checkpoints"]
    return sorted(found, key=lambda p: (p / CONFIG).stat().st_mtime if (p / CONFIG).exists() else 0)

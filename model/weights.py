"""Model directories: config.json, tokenizer.json and weights in .safetensors. Nothing in them can run code.

The weights are one file, or the shards that the processes of a run wrote; torch.distributed.checkpoint reads
both, with or without a process group, and into sharded models.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata

from hotlap.common.errors import DataError
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.manifest import MANIFEST, TENSORS, verify
from hotlap.model.tokenizer import Tokenizer

CONFIG, TOKENIZER, WEIGHTS, STATE = "config.json", "tokenizer.json", "model.safetensors", "state.json"
SHOWN = 5  # differences that an error lists


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write a model directory with its weights in one file into an existing folder."""
    save_description(folder, model.config, tokenizer)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)


def save_description(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Write what a model directory has beside its weights."""
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)


def load_model(path: str | Path, device: torch.device, compute_dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a model directory, or of the newest checkpoint of a run."""
    folder, config, tokenizer = open_model(path)
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.to_empty(device=device).init_weights()  # for the tables that are not stored
    load_weights(model, folder)
    return model.eval(), tokenizer


def open_model(path: str | Path) -> tuple[Path, GPTConfig, Tokenizer]:
    """Where the model lies that a path means, checked against its hashes, its shape and its tokenizer."""
    folder = model_folder(path)
    if (folder / MANIFEST).is_file():  # a model directory from elsewhere has no hashes to check
        verify(folder, weights_only=True)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    config = load_config(folder)
    if config.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}; "
            "they are not of one run"
        )
    return folder, config, tokenizer


def load_config(folder: Path) -> GPTConfig:
    try:
        return GPTConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / CONFIG} is not a model's configuration: {error}") from error


def stage(folder: Path) -> str | None:
    """What a model was trained for last, "pretrain" or "sft", where its directory says so."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8")).get("stage")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{folder / STATE} is not a checkpoint's state: {error!r}") from error


def load_weights(model: GPT, folder: Path) -> None:
    """Fill a model, sharded or not, from the weights in a folder, which must be the model's in names, shapes
    and dtypes: nothing is cast. Each process reads what it needs of them, and none waits for another.
    """
    weights = model.state_dict()
    if found := tensor_differences(folder, weights):
        raise DataError(f"{folder} does not fit the model: {listed(found)}")
    read_tensors(folder, weights)


def tensor_differences(folder: Path, into: dict[str, torch.Tensor]) -> list[str]:
    """`name: saved X, current Y` for each tensor that is not stored in a folder as it is in `into`."""
    stored, found = stored_tensors(folder), []
    for name in sorted({*stored, *into}):
        saved = current = "nothing"
        if name in stored:
            size, dtype = stored[name].size, stored[name].properties.dtype
            saved = described(size, dtype)
            if sum(math.prod(chunk.sizes) for chunk in stored[name].chunks) != math.prod(size):
                saved = "parts that do not make a whole"
        if name in into:
            current = described(into[name].shape, into[name].dtype)
        if saved != current:
            found.append(f"{name}: saved {saved}, current {current}")
    return found


def described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def listed(differences: list[str]) -> str:
    """The first few differences on one line."""
    more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
    return "; ".join(differences[:SHOWN] + more)


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Size, dtype and parts of every tensor in a folder's .safetensors files."""
    for path in sorted(folder.glob(TENSORS)):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"the tensors of {folder} cannot be read: {error!r}") from error


def read_tensors(folder: Path, into: dict[str, torch.Tensor]) -> None:
    """Copy what is stored in a folder into tensors that it fits, one slice at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it may be
        try:
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(into, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            cause, _ = error.failures[0]
            raise DataError(f"the tensors of {folder} cannot be read: {cause}") from cause


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
    return all((path / name).is_file() for name in (CONFIG, TOKENIZER)) and any(path.glob(TENSORS))


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. One without a manifest was never finished."""
    found = {p: re.fullmatch(r"step-(\d{6,})", p.name) for p in (run / "checkpoints").glob("step-*")}
    whole = [p for p, name in found.items() if name and (p / MANIFEST).is_file()]
    return sorted(whole, key=lambda p: int(found[p][1]))


def find_models(root: Path) -> list[Path]:
    """Runs and model directories under root, newest last."""
    found = []
    for folder, names, _ in os.walk(root):
        if is_model(Path(folder)) or ("checkpoints" in names and run_checkpoints(Path(folder))):
            found.append(Path(folder))
        names[:] = [n for n in names if n != "checkpoints"]
    return sorted(found, key=lambda p: (p / CONFIG).stat().st_mtime if (p / CONFIG).exists() else 0)

"""Model directories: config.json, tokenizer.json and weights in .safetensors. Loading one never runs code.

Weights are one file, or the shards that the ranks of a run wrote with torch.distributed.checkpoint. Either is
read into a whole model or a sharded one, without a process group. A directory may have adapters instead,
which are merged into their base as it is loaded (adapter_files.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

import torch

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write_object
from hotlap.common.memory import require_memory
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.model.adapter_files import check_bases, merge, read_lora
from hotlap.model.build import build
from hotlap.model.config import Shape, counts_of, rotary_bytes, shape_from
from hotlap.model.lora import base_weights
from hotlap.model.manifest import MANIFEST, TENSORS, verify
from hotlap.model.peft import PEFT_CONFIG, is_peft
from hotlap.model.tensors import listed, read_tensors, save_tensors, stored_tensors, tensor_differences
from hotlap.model.tokenizer import TOKENIZER, Tokenizer
from hotlap.model.transformer import Transformer

CONFIG, WEIGHTS, STATE = "config.json", "model.safetensors", "state.json"
CHECKPOINTS, BEST = "checkpoints", "best.json"  # in the folder of a run
SHOWN = 5  # models listed in an error


def save_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a model, with its weights in one file, into an existing folder."""
    save_description(folder, model.config, tokenizer)
    save_tensors(model.state_dict(), folder / WEIGHTS)


def save_description(folder: Path, config: Shape, tokenizer: Tokenizer) -> None:
    """Write config.json and tokenizer.json."""
    write_object(folder / CONFIG, dataclasses.asdict(config))
    tokenizer.save(folder / TOKENIZER)


def load_model(
    path: str | Path, device: torch.device, compute_dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """Load model and tokenizer from a model directory, or from the newest checkpoint of a run.

    compute_dtype: None is the fastest one on this device.
    """
    folder, config, tokenizer = open_model(path)
    needed = 4 * counts_of(config)["total"] + rotary_bytes(config)
    require_memory(f"the model in {folder}", needed, "use a smaller one", device)
    compute_dtype = compute_dtype or fast_dtype(device.type, config.width)
    with torch.device("meta"):
        model = build(config, compute_dtype)
    model.to_empty(device=device).init_weights()  # for buffers that are not stored
    load_weights(model, folder)
    return model.eval(), tokenizer


def open_model(path: str | Path) -> tuple[Path, Shape, Tokenizer]:
    """Find the model of a path and check its hashes, and those of its base if it has adapters. Returns its
    folder, shape and tokenizer.
    """
    folders = lineage(model_folder(path))
    for folder in folders:
        if (folder / MANIFEST).is_file():  # exported models have no hashes
            verify(folder, weights_only=True)
    check_bases(folders)
    folder = next(folder for folder in folders if not is_peft(folder))
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    config = load_config(folder)
    if config.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}; "
            "they are from different runs"
        )
    check_size(folders[-1], config)
    return folders[0], config, tokenizer


def check_size(folder: Path, config: Shape) -> None:
    """Raise DataError or ValueError for a config.json that claims far more than the folder has weights, or
    more context than the device has memory, before a model of that shape is built.
    """
    claimed = counts_of(config)["total"]
    stored = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    if claimed > 2 * stored:
        raise DataError(
            f"{folder / CONFIG} is of a model of {claimed:,} parameters, but the tensors there have "
            f"{stored:,}; use the files of one model"
        )
    what = f"{folder / CONFIG}: a context of {config.context} tokens"
    tables = 2 * rotary_bytes(config)  # they are computed, then copied
    require_memory(what, tables, "lower it there", default_device())


def load_config(folder: Path) -> Shape:
    try:
        return shape_from(read_object(folder / CONFIG))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not a model's configuration: {error}") from error


def model_name(folder: Path) -> str:
    """A model's name for clients: the path of its run below the last folder named runs, else the name of its
    folder. runs/tiny/sft/checkpoints/step-000100 is tiny-sft.
    """
    parts = list(folder.resolve().parts[1:])
    if len(parts) > 2 and parts[-2] == "checkpoints":
        parts = parts[:-2]
    below = parts[::-1].index("runs") if "runs" in parts else 1
    name = "-".join(parts[len(parts) - below :] or parts[-1:])
    return re.sub("[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64] or "model"


def stage(folder: Path) -> str | None:
    """The last training stage of a model, "pretrain" or "sft"; None if its directory does not say."""
    try:
        found = read_object(folder / STATE).get("stage")
    except FileNotFoundError:
        return None
    if not isinstance(found, str | None):
        raise DataError(f"{folder / STATE}: stage={found!r} must be the name of a stage")
    return found


def load_weights(model: Transformer, folder: Path) -> None:
    """Load the weights in a folder into a model, sharded or not. Names, shapes and dtypes must be the same:
    nothing is cast. Each process reads only what it needs, without waiting for others.

    A folder's adapters are merged into the weights; those that the model itself has stay as they are.
    """
    *adapted, folder = lineage(folder)
    weights = base_weights(model)
    if found := tensor_differences(folder, weights):
        raise DataError(f"{folder} does not fit the model: {listed(found)}")
    read_tensors(folder, weights)
    for above in reversed(adapted):
        merge(model, above)


def lineage(folder: Path) -> list[Path]:
    """A model's folder; if it has adapters the folder of their base; and so on, to a model that is whole."""
    folders = [folder]
    while lora := read_lora(folders[-1]):
        found = [base for base in lora.bases if is_model(base) or run_checkpoints(base)]
        if not found:
            saved = f" (weights of sha256 {lora.base_sha256[:12]}...)" if lora.base_sha256 else ""
            raise FileNotFoundError(
                f"{folders[-1]} has adapters for the base {lora.bases[0]}{saved}, and there is no model; "
                "move it back, or put a link there"
            )
        base = model_folder(found[0])
        if base.resolve() in [folder.resolve() for folder in folders]:
            raise DataError(f"{folders[-1]} has adapters whose base is {base}, which is built on them")
        folders.append(base)
    return folders


def model_folder(path: str | Path | None) -> Path:
    """The model directory of a path: the path itself, the newest checkpoint of a run, or its best one for
    RUN/checkpoints/best. None: that of the newest model under runs/.
    """
    if path is None:
        path = next(reversed(find_models(Path("runs"))), "runs")
    path = Path(path)
    if is_model(path):
        return path
    if checkpoints := run_checkpoints(path):
        return checkpoints[-1]
    if names_best(path) and (best := best_checkpoint(path.parent.parent)):
        return best
    raise FileNotFoundError(f"{what_is_at(path)}; {models_found(find_models(Path('runs')))}")


def what_is_at(path: Path) -> str:
    """Why a path has no model, and what to do."""
    if names_best(path) and run_checkpoints(path.parent.parent):
        run = path.parent.parent
        return f"{run}/{BEST} names none of the checkpoints that are there; give {run} for the newest one"
    if not os.path.exists(path):
        return f"no model at {path}"
    if not os.path.isdir(path):
        return f"{path} is a file, not the folder of a run or model"
    if not os.access(path, os.R_OK | os.X_OK):
        return f"{path} is a folder that you may not read"
    if is_model(path.parent):
        return f"{path} is a part of a checkpoint; give {path.parent}"
    if run_checkpoints(path.parent) and path.name == "checkpoints":
        return f"{path} has all checkpoints of a run; give {path.parent} for the newest one, or one of them"
    names = os.listdir(path)
    if "checkpoints" in names or {CONFIG, "run.lock"} <= {*names}:
        return f"{path} is a run without a complete checkpoint; train it on with --resume auto"
    if any(path.glob("*_[0-9]*.bin")):
        return f"{path} has token shards and no model; train one on them with `hotlap pretrain --data {path}`"
    missing = [name for name in (CONFIG, TOKENIZER, TENSORS) if not any(path.glob(name))]
    if not {CONFIG, TENSORS} <= {*missing}:
        return f"{path} is no whole model: it lacks {' and '.join(missing)}; copy or export it again"
    return f"no model in the folder {path}"


def models_found(found: list[Path]) -> str:
    """The newest models, for an error."""
    if not found:
        return "none found under runs/; train one with `make demo`"
    more = f" and {len(found) - SHOWN} older ones" if len(found) > SHOWN else ""
    return f"found: {', '.join(map(str, found[-SHOWN:]))}{more}"


def is_model(path: Path) -> bool:
    whole = all(os.path.isfile(path / name) for name in (CONFIG, TOKENIZER)) and any(path.glob(TENSORS))
    return whole or is_peft(path)


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. One without a manifest is incomplete."""
    folder = run / CHECKPOINTS
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d{6,}", name)]
    except OSError:  # there is none, or it cannot be read
        return []
    whole = [name for name in names if os.path.isfile(folder / name / MANIFEST)]
    return [folder / name for name in sorted(whole, key=lambda name: int(name.removeprefix("step-")))]


def names_best(path: Path) -> bool:
    return path.name == "best" and path.parent.name == CHECKPOINTS


def best_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of a run with the best validation; None if it has none. DataError if best.json
    is damaged.
    """
    step = read_best(run).get("step")
    named = [folder for folder in run_checkpoints(run) if int(folder.name.removeprefix("step-")) == step]
    return named[0] if named else None


def read_best(run: Path) -> dict:
    """What best.json says of a run's best checkpoint, its step and validation; empty if there is none."""
    try:
        return read_object(run / BEST)
    except FileNotFoundError:
        return {}


def find_models(root: Path) -> list[Path]:
    """Runs and model directories under root, newest last; without folders that cannot be read."""
    found = []
    for folder, names, _ in os.walk(root):
        if is_model(Path(folder)) or ("checkpoints" in names and run_checkpoints(Path(folder))):
            found.append(Path(folder))
        names[:] = [n for n in names if n != "checkpoints"]
    return sorted(found, key=changed)


def changed(folder: Path) -> float:
    """When a run or model was written; 0 if unknown."""
    try:
        return os.path.getmtime(folder / (PEFT_CONFIG if is_peft(folder) else CONFIG))
    except OSError:
        return 0.0

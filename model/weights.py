"""Model directories: config.json, tokenizer.json and weights in .safetensors. Loading one never runs code.

Weights are one file, or the shards that the ranks of a run wrote with torch.distributed.checkpoint. Either is
read into a whole model or a sharded one, without a process group.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write
from hotlap.common.memory import require_memory
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.model.config import GPTConfig, counts_of, rotary_bytes
from hotlap.model.gpt import GPT
from hotlap.model.manifest import MANIFEST, TENSORS, verify
from hotlap.model.tokenizer import TOKENIZER, Tokenizer

CONFIG, WEIGHTS, STATE = "config.json", "model.safetensors", "state.json"
OFFSETS = "DCP_SHARDING_INFO"  # a shard's metadata: where its part of each tensor begins, as JSON
SHOWN = 5  # differences listed in an error


class Part(NamedTuple):
    """A tensor, or a rank's part of one, in a .safetensors file."""

    path: Path
    offsets: tuple[int, ...]
    """Where the part begins in the whole tensor, in each dimension."""
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor in a folder's .safetensors files."""

    dtype: torch.dtype
    parts: list[Part]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor, if none of its parts is missing."""
        ends = [map(sum, zip(part.offsets, part.shape, strict=True)) for part in self.parts]
        return tuple(map(max, zip(*ends, strict=True)))


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write a model, with its weights in one file, into an existing folder."""
    save_description(folder, model.config, tokenizer)
    try:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error


def save_description(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Write config.json and tokenizer.json."""
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    write(folder / CONFIG, text)
    tokenizer.save(folder / TOKENIZER)


def load_model(
    path: str | Path, device: torch.device, compute_dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """Load model and tokenizer from a model directory, or from the newest checkpoint of a run.

    compute_dtype: None is the fastest one on this device.
    """
    folder, config, tokenizer = open_model(path)
    needed = 4 * counts_of(config)["total"] + rotary_bytes(config)
    require_memory(f"the model in {folder}", needed, "use a smaller one", device)
    compute_dtype = compute_dtype or fast_dtype(device.type, config.width)
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.to_empty(device=device).init_weights()  # for buffers that are not stored
    load_weights(model, folder)
    return model.eval(), tokenizer


def open_model(path: str | Path) -> tuple[Path, GPTConfig, Tokenizer]:
    """Find the model of a path and check its hashes. Returns its folder, shape and tokenizer."""
    folder = model_folder(path)
    if (folder / MANIFEST).is_file():  # exported models have no hashes
        verify(folder, weights_only=True)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    config = load_config(folder)
    if config.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}; "
            "they are from different runs"
        )
    check_size(folder, config)
    return folder, config, tokenizer


def check_size(folder: Path, config: GPTConfig) -> None:
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


def load_config(folder: Path) -> GPTConfig:
    try:
        return GPTConfig.from_dict(read_object(folder / CONFIG))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not a model's configuration: {error}") from error


def stage(folder: Path) -> str | None:
    """The last training stage of a model, "pretrain" or "sft"; None if its directory does not say."""
    try:
        found = read_object(folder / STATE).get("stage")
    except FileNotFoundError:
        return None
    if not isinstance(found, str | None):
        raise DataError(f"{folder / STATE}: stage={found!r} must be the name of a stage")
    return found


def load_weights(model: GPT, folder: Path) -> None:
    """Load the weights in a folder into a model, sharded or not. Names, shapes and dtypes must be the same:
    nothing is cast. Each process reads only what it needs, without waiting for others.
    """
    weights = model.state_dict()
    if found := tensor_differences(folder, weights):
        raise DataError(f"{folder} does not fit the model: {listed(found)}")
    read_tensors(folder, weights)


def tensor_differences(folder: Path, into: dict[str, torch.Tensor]) -> list[str]:
    """`name: saved X, current Y` for each tensor that differs between a folder and `into`."""
    stored, found = stored_tensors(folder), []
    for name in sorted({*stored, *into}):
        saved = current = "nothing"
        if name in stored:
            shape = stored[name].shape
            saved = described(shape, stored[name].dtype)
            if sum(math.prod(part.shape) for part in stored[name].parts) != math.prod(shape):
                saved = "incomplete parts"
        if name in into:
            current = described(into[name].shape, into[name].dtype)
        if saved != current:
            found.append(f"{name}: saved {saved}, current {current}")
    return found


def described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def listed(differences: list[str]) -> str:
    """The first few differences on one line."""
    more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
    return "; ".join(differences[:SHOWN] + more)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Dtype and parts of every tensor in a folder's .safetensors files."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob(TENSORS)):
        try:
            with safe_open(path, "pt") as file:
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "null"))
                for name in file.keys():  # noqa: SIM118  it is no dict
                    piece = file.get_slice(name)
                    shape = tuple(piece.get_shape())
                    dtype = (piece[:0] if shape else file.get_tensor(name)).dtype
                    begin = (0,) * len(shape) if offsets is None else part_begin(offsets, name, shape)
                    stored = found.setdefault(name, Stored(dtype, []))
                    if dtype != stored.dtype or any(len(part.shape) != len(shape) for part in stored.parts):
                        raise ValueError(f"{name} has another dtype or shape in another file")
                    stored.parts.append(Part(path, begin, shape))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    return found


def part_begin(offsets: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where a shard's part of a tensor begins. ValueError if its metadata do not say."""
    try:
        begin = tuple(offsets[name]["saved_offsets"])
    except (LookupError, TypeError):
        raise ValueError(f"{OFFSETS} does not say where {name} begins") from None
    if len(begin) != len(shape) or not all(type(n) is int and n >= 0 for n in begin):
        raise ValueError(f"{OFFSETS}: {name} of shape {list(shape)} cannot begin at {begin}")
    return begin


def read_tensors(folder: Path, into: dict[str, torch.Tensor]) -> None:
    """Read the tensors in a folder into existing tensors, whole or sharded, of the same names, shapes and
    dtypes.
    """
    stored, mine = stored_tensors(folder), {name: local_part(tensor) for name, tensor in into.items()}
    parts = [(part, name) for name in into for part in stored[name].parts]
    for path in sorted({part.path for part, _ in parts}):
        try:
            with safe_open(path, "pt") as file:
                for part, name in parts:
                    if part.path == path:
                        read_part(file.get_slice(name), part, *mine[name])
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {path}: {error}") from error


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The part of a tensor that this process holds, and where it begins in the whole."""
    if not hasattr(tensor, "device_mesh"):  # torch takes a second to import DTensor
        return tensor, (0,) * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()
    return tensor.to_local(), tuple(chunk.offsets)


@torch.no_grad()
def read_part(file: Any, part: Part, into: torch.Tensor, begin: tuple[int, ...]) -> None:
    """Read what a part in a file, of which `file` reads slices, has for a tensor that begins at `begin`."""
    from_file, to_tensor = [], []
    for offset, size, start, length in zip(part.offsets, part.shape, begin, into.shape, strict=True):
        low, high = max(offset, start), min(offset + size, start + length)
        if low >= high:
            return
        from_file.append(slice(low - offset, high - offset))
        to_tensor.append(slice(low - start, high - start))
    into[tuple(to_tensor)].copy_(file[tuple(from_file)])


def model_folder(path: str | Path | None) -> Path:
    """The model directory of a path: the path itself, or the newest checkpoint of a run. None: that of the
    newest model under runs/.
    """
    if path is None:
        path = next(reversed(find_models(Path("runs"))), "runs")
    path = Path(path)
    if is_model(path):
        return path
    if checkpoints := run_checkpoints(path):
        return checkpoints[-1]
    raise FileNotFoundError(f"{what_is_at(path)}; {models_found(find_models(Path('runs')))}")


def what_is_at(path: Path) -> str:
    """Why a path has no model, and what to do."""
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
    return all(os.path.isfile(path / name) for name in (CONFIG, TOKENIZER)) and any(path.glob(TENSORS))


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. One without a manifest is incomplete."""
    folder = run / "checkpoints"
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d{6,}", name)]
    except OSError:  # there is none, or it cannot be read
        return []
    whole = [name for name in names if os.path.isfile(folder / name / MANIFEST)]
    return [folder / name for name in sorted(whole, key=lambda name: int(name.removeprefix("step-")))]


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
        return os.path.getmtime(folder / CONFIG)
    except OSError:
        return 0.0

"""Tensors in .safetensors files: what is there, reading it into a model, whole or sharded, and writing one.

A tensor may lie in parts, the shards that the ranks of a run wrote with torch.distributed.checkpoint. Each
process reads what it needs, without a process group.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hotlap.common.errors import DataError
from hotlap.model.manifest import TENSORS

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
    return tensors_in(sorted(folder.glob(TENSORS)))


def tensors_in(paths: list[Path]) -> dict[str, Stored]:
    """Dtype and parts of every tensor in .safetensors files."""
    found: dict[str, Stored] = {}
    for path in paths:
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


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> None:
    """Write whole tensors as one .safetensors file. OSError if it cannot be, such as on a full disk."""
    metadata |= {"format": "pt"}  # which Transformers needs to be told
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


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

"""Adapters in model folders: which base they belong to, whether it is still the same, and merging.

A folder with adapters is a checkpoint of a run, with adapter.json, or one of PEFT's (peft.py). Either way it
names its base, which may be such a folder itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.files import read_object
from hotlap.model.config import Shape
from hotlap.model.lora import LoRA, adapted_layers, adapter_shapes, update
from hotlap.model.peft import is_peft, read_peft, read_peft_config
from hotlap.model.tensors import listed, local_part, read_tensors, stored_tensors, tensor_differences
from hotlap.model.transformer import Transformer

ADAPTER = "adapter.json"


def save_lora(folder: Path, lora: LoRA) -> None:
    """Write adapter.json. It has the path of the base, and the one from this folder, for runs that are moved
    or copied together.
    """
    base = lora.bases[0]
    fields = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "base": str(base),
        "base_from_here": os.path.relpath(base, folder.resolve()),
        "base_sha256": lora.base_sha256,
    }
    (folder / ADAPTER).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_lora(folder: Path) -> LoRA | None:
    """What a folder's adapters are; None of a model that is whole."""
    if is_peft(folder):
        return read_peft_config(folder)[0]
    path = folder / ADAPTER
    if not os.path.isfile(path):
        return None
    fields = read_object(path)
    kinds = {
        "rank": int,
        "alpha": (int, float),
        "base": str,
        "base_from_here": str,
        "base_sha256": str,
    }
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind) or (kind is not str and not fields[name] > 0):
            raise DataError(f"{path}: {name}={fields.get(name)!r} is not what a run writes")
    from_here = os.path.normpath(folder.resolve() / fields["base_from_here"])
    bases = Path(fields["base"]), Path(from_here)
    return LoRA(fields["rank"], fields["alpha"], bases, fields["base_sha256"])


def read_adapters(folder: Path, config: Shape) -> dict[str, Tensor]:
    """The adapters in a folder, whole, in float32, by our names. DataError lists tensors that do not fit."""
    if is_peft(folder):
        return read_peft(folder, config)
    shapes = adapter_shapes(config, read_lora(folder).rank)
    expected = {
        f"blocks.{layer}.{name}": torch.empty(shape, device="meta")
        for layer in range(config.layers)
        for name, shape in shapes.items()
    }
    if found := tensor_differences(folder, expected):
        raise DataError(f"{folder} does not fit the model: {listed(found)}")
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in expected.items()}
    read_tensors(folder, tensors)
    return tensors


@torch.no_grad()
def merge(model: Transformer, folder: Path) -> None:
    """Add the adapters in a folder to the float32 weights of a model, whole or sharded, in place."""
    tensors, scale = read_adapters(folder, model.config), read_lora(folder).scale
    for i, block in enumerate(model.blocks):
        for name, (_, outputs) in adapted_layers(model.config).items():
            A, B = (tensors[f"blocks.{i}.{name}.adapter.{x}"] for x in "AB")
            rows, (first, _) = local_part(block.get_submodule(name).weight.detach())
            whole = update(A, B, outputs, scale)  # on the CPU: everywhere with the same rounding
            rows.add_(whole[first : first + len(rows)].to(rows.device))


def weights_sha256(folders: list[Path]) -> str:
    """A hash of the weights of a folder and of the bases below it, however they are divided into files."""
    digest = hashlib.sha256()
    for folder in folders:
        if lora := read_lora(folder):
            digest.update(f"{lora.rank} {lora.alpha}".encode())
        for name, stored in sorted(stored_tensors(folder).items()):
            tensor = torch.empty(stored.shape, dtype=stored.dtype)
            read_tensors(folder, {name: tensor})
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def check_bases(folders: list[Path]) -> None:
    """DataError if a base has other weights than when the adapters above it were trained.

    folders: each the base of the one before.
    """
    for i, folder in enumerate(folders[:-1]):
        expected, base = read_lora(folder).base_sha256, folders[i + 1]
        if expected and expected != (found := weights_sha256(folders[i + 1 :])):
            raise DataError(
                f"{folder} has adapters for other weights than {base} holds now: saved sha256 "
                f"{expected[:12]}..., current {found[:12]}...; restore that base"
            )

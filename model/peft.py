"""The files of PEFT, Hugging Face's library of adapters: adapter_config.json and adapter_model.safetensors.

They are those of a base of the architecture that plain models of ours map to, Transformers' Apertus: our
fused layer of queries, keys and values is three layers there, and rotary positions turn the other way, which
exchanging the halves of each head of queries and keys makes up for. Adapters see that in the rows of B.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write_object
from hotlap.model import stock
from hotlap.model.config import GPTConfig
from hotlap.model.lora import LoRA, adapted_layers
from hotlap.model.stock import LAYERS, turned
from hotlap.model.tensors import listed, read_tensors, save_tensors, stored_tensors, tensor_differences

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE_SHA256 = "base_sha256"  # in the metadata of the weights, which PEFT ignores
PREFIX = "base_model.model"
TARGETS = stock.TARGETS["apertus"]
NAMES = [target.split(".")[1] for targets in TARGETS.values() for target in targets]
# Fields that change nothing about what adapters compute; of the others, those that are set are refused.
HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora",
    "lora_dropout", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip


def is_peft(folder: Path) -> bool:
    return os.path.isfile(folder / PEFT_CONFIG)  # False where one may not look


def read_peft_config(folder: Path) -> tuple[LoRA, tuple[str, ...]]:
    """The adapters that a folder of PEFT's describes, and their target modules. DataError names a field that
    is set and not supported.
    """
    path = folder / PEFT_CONFIG
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type={fields.get('peft_type')!r} is not supported; it must be LORA")
    rank, alpha, base = (fields.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    for name, value, kinds in (("r", rank, (int,)), ("lora_alpha", alpha, (int, float))):
        if type(value) not in kinds or not 0 < value < math.inf:
            raise DataError(f"{path}: {name}={value!r} must be a positive number")
    if not isinstance(base, str) or not base:
        raise DataError(f"{path}: base_model_name_or_path={base!r} must name the folder of the base model")
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"{path}: target_modules={targets!r:.40} must be a list of names")
    for name, value in fields.items():
        neutral = ("none",) if name == "bias" else (True, "gaussian") if name == "init_lora_weights" else ()
        if name not in HARMLESS and value and value not in neutral:
            raise DataError(f"{path}: {name}={str(value)[:40]!r} is not supported; only plain LoRA is")
    if fields.get("use_rslora"):  # which scales by alpha / sqrt(r)
        alpha *= rank**0.5
    if not (folder / PEFT_WEIGHTS).is_file():
        pickled = (folder / PICKLED).is_file()
        why = f"; {PICKLED} is pickled, which may run code: save it as safetensors" if pickled else ""
        raise DataError(f"{folder} has no {PEFT_WEIGHTS}{why}")
    try:
        with safe_open(folder / PEFT_WEIGHTS, "pt") as file:
            sha256 = (file.metadata() or {}).get(BASE_SHA256)
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {folder / PEFT_WEIGHTS}: {error}") from error
    return LoRA(rank, alpha, (Path(base), folder / base), sha256), tuple(targets)


def peft_shapes(config: GPTConfig, rank: int, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The shapes of the tensors of adapters beside these target modules, by PEFT's names.

    targets: names of modules, or the last parts of such names. DataError if there is none of a name.
    """
    shapes, found = {}, set()
    for layer in range(config.layers):
        for name, (inputs, outputs) in adapted_layers(config).items():
            for target, size in zip(TARGETS[name], outputs, strict=True):
                module = f"{LAYERS}.{layer}.{target}"
                if matching := {t for t in targets if f".{module}".endswith(f".{t}")}:
                    found |= matching
                    shapes[f"{PREFIX}.{module}.lora_A.weight"] = (rank, inputs)
                    shapes[f"{PREFIX}.{module}.lora_B.weight"] = (size, rank)
    if other := sorted(set(targets) - found):
        raise DataError(f"target_modules has {other[0]!r}; supported are {', '.join(NAMES)}")
    return shapes


def read_peft(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The adapters by our names, in float32. Target modules that PEFT's lack are zero. DataError lists
    tensors that do not fit.
    """
    lora, targets = read_peft_config(folder)
    dtypes = {n: t.dtype if t.dtype in DTYPES else DTYPES[0] for n, t in stored_tensors(folder).items()}
    try:
        shapes = peft_shapes(config, lora.rank, targets)
    except DataError as error:
        raise DataError(f"{folder / PEFT_CONFIG}: {error}") from None
    expected = {n: torch.empty(s, dtype=dtypes.get(n), device="meta") for n, s in shapes.items()}
    if found := tensor_differences(folder, expected):
        raise DataError(f"{folder / PEFT_WEIGHTS} does not fit the model: {listed(found)}")
    into = {name: torch.empty_like(tensor, device="cpu") for name, tensor in expected.items()}
    read_tensors(folder, into)
    tensors = {}
    for layer in range(config.layers):
        for name, (inputs, outputs) in adapted_layers(config).items():
            As, Bs = [], []
            for target, size in zip(TARGETS[name], outputs, strict=True):
                key = f"{PREFIX}.{LAYERS}.{layer}.{target}.lora_"
                zeros = torch.zeros(lora.rank, inputs), torch.zeros(size, lora.rank)
                A, B = (into.get(f"{key}{x}.weight", zero) for x, zero in zip("AB", zeros, strict=True))
                As.append(A.float())
                Bs.append(turned(B.float(), target, config))
            tensors[f"blocks.{layer}.{name}.adapter.A"] = torch.cat(As)
            tensors[f"blocks.{layer}.{name}.adapter.B"] = torch.cat(Bs)
    return tensors


def write_peft(folder: Path, tensors: dict[str, Tensor], lora: LoRA, config: GPTConfig) -> None:
    """Write adapters, whole and by our names, into an existing folder."""
    found = {}
    for layer in range(config.layers):
        for name, (_, outputs) in adapted_layers(config).items():
            A, B = (tensors[f"blocks.{layer}.{name}.adapter.{x}"] for x in "AB")
            for target, a, b in zip(TARGETS[name], A.chunk(len(outputs)), B.split(outputs), strict=True):
                key = f"{PREFIX}.{LAYERS}.{layer}.{target}.lora_"
                found[f"{key}A.weight"], found[f"{key}B.weight"] = a.clone(), turned(b, target, config)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(lora.bases[0]),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": NAMES,
        "bias": "none",
        "inference_mode": True,
    }
    metadata = {BASE_SHA256: lora.base_sha256} if lora.base_sha256 else {}
    save_tensors(found, folder / PEFT_WEIGHTS, **metadata)
    write_object(folder / PEFT_CONFIG, fields)

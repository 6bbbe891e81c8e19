"""`hotlap export weights`: write a model for other programs."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.common import options
from hotlap.common.files import write
from hotlap.common.terminal import printable
from hotlap.model.weights import STATE, load_model, model_folder, save_model, stage


@dataclass(frozen=True)
class ExportConfig:
    """Write a model directory with config.json, tokenizer.json and model.safetensors."""

    model: Path = Path("runs/tiny/sft")
    """Run, checkpoint or model directory."""
    out: Path = Path("exported")
    """Folder to write; it must be empty or not exist yet."""


def export_weights(config: ExportConfig) -> Path:
    """Write the model in float32, unsharded, and return its folder."""
    out = config.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name a new folder with --out")
    folder = model_folder(config.model)
    model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        save_model(partial, model, tokenizer)
        if trained_for := stage(folder):  # chat.py needs to know a base model
            write(partial / STATE, json.dumps({"stage": trained_for}) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return out


def main(arguments: list[str]) -> None:
    """`hotlap export weights`."""
    print(printable(str(export_weights(options.parse(ExportConfig, arguments, command="export weights")))))

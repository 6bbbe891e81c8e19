"""`hotlap export weights`: write a model for other programs."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

import torch

from hotlap.common.files import write
from hotlap.common.terminal import printable
from hotlap.model.config import ExportConfig
from hotlap.model.weights import STATE, load_model, model_folder, save_model, stage


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


def main(config: ExportConfig) -> None:
    """`hotlap export weights`."""
    print(printable(str(export_weights(config))))

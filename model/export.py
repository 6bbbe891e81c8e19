"""`hotlap export weights` and `hotlap export adapter`: write a model, or its adapters, for other programs."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hotlap.common.files import write
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.adapter_files import read_adapters, read_lora
from hotlap.model.config import AdapterExportConfig, ExportConfig, GPT2Config
from hotlap.model.peft import write_peft
from hotlap.model.stock import extras_of, stock_class
from hotlap.model.weights import (
    STATE,
    lineage,
    load_model,
    model_folder,
    open_model,
    save_model,
    stage,
)


def export_weights(config: ExportConfig) -> Path:
    """Write the model in float32, unsharded and with its adapters merged, and return its folder."""
    with new_folder(config.out) as partial:
        folder = model_folder(config.model)
        model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32)
        save_model(partial, model, tokenizer)
        if trained_for := stage(folder):  # chat.py needs to know a base model
            write(partial / STATE, json.dumps({"stage": trained_for}) + "\n")
    return config.out


def export_adapter(config: AdapterExportConfig) -> Path:
    """Write a model's adapters, not its weights, and return their folder."""
    with new_folder(config.out) as partial:
        folder, shape, _ = open_model(config.model)
        lora = read_lora(folder)
        if lora is None:
            raise ValueError(
                f"{folder} has no adapters, for it was trained whole; export its weights with `hotlap export "
                "weights`, or train with --lora-rank"
            )
        if isinstance(shape, GPT2Config):
            raise ValueError(
                f"{folder}: adapters of a GPT-2 cannot be written as PEFT's, whose layers for it have other "
                "parts; `hotlap export weights` merges them"
            )
        if stock_class(shape) != "apertus":
            log.warning(
                "the base has %s: only hotlap can use the adapters, not Transformers",
                ", ".join([*extras_of(shape), *(["softcap"] if shape.softcap else [])]),
            )
        base = lineage(folder)[1].resolve()  # where it is now
        lora = dataclasses.replace(lora, bases=(base,))
        write_peft(partial, read_adapters(folder, shape), lora, shape)
    return config.out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write, which becomes `out` in the end; after an error nothing of it is left.

    An `out` that exists and is empty stays the folder it is: it may be where the user is, a link or a mount.
    """
    given = out.is_dir()
    if os.path.lexists(out) and not (given and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name a new folder with --out")
    unique = secrets.token_hex(4)
    partial = out / f".tmp-{unique}" if given else out.with_name(f".tmp-{out.name}-{unique}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if not given:
            partial.rename(out)
            return
        for path in sorted(partial.iterdir()):
            path.rename(out / path.name)
        partial.rmdir()
    except BaseException:
        shutil.rmtree(partial)
        raise


def main(config: ExportConfig) -> None:
    """`hotlap export weights`."""
    print(printable(str(export_weights(config))))


def adapter_main(config: AdapterExportConfig) -> None:
    """`hotlap export adapter`."""
    print(printable(str(export_adapter(config))))

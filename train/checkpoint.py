"""Checkpoints that a crash cannot spoil: safetensors and JSON, hashed, published by one rename.

A checkpoint is a model directory (see `hotlap.model.weights`) with optimizer.safetensors, state.json and
manifest.json. It is written under another name, the manifest last, and renamed when everything is on the
disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    file_sha256,
    load_tensors,
    load_weights,
    run_checkpoints,
    save_model,
    verify,
)  # fmt: skip
from hotlap.train.optim import MuonAdamW

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
KEEP = 2  # newest checkpoints of a run


def save_checkpoint(
    run: Path, step: int, model: GPT, optimizer: MuonAdamW, tokenizer: Tokenizer, state: dict
) -> Path:
    """Write checkpoints/step-N of a run, and remove all but the newest two. state: what JSON can hold."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    if (final / MANIFEST).exists():
        return final
    check_space(folder, model, optimizer)
    partial = folder / f".tmp-step-{step:06d}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        save_model(partial, model, tokenizer)
        tensors = dict(optimizer.named_state())
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        save_file({k: v.reshape(1) if v.ndim == 0 else v.contiguous() for k, v in tensors.items()},
                  partial / OPTIMIZER)  # fmt: skip
        (partial / STATE).write_text(json.dumps({"step": step} | state, indent=1) + "\n")
        files = {
            p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(partial.iterdir())
        }
        for name in files:
            sync(partial / name)
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n")
        sync(manifest)
        sync(partial)
        if final.exists():  # left by a crash, and without a manifest
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in run_checkpoints(run)[:-KEEP]:
        (old / MANIFEST).unlink()  # first, so that half of a checkpoint never looks whole
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, model: GPT, optimizer: MuonAdamW) -> dict:
    """Fill model, optimiser and random state, bit for bit, and return the rest of the state.

    DataError, naming the file, where anything is missing, changed, or of another shape.
    """
    verify(folder)
    load_weights(model, folder / WEIGHTS)
    tensors = dict(optimizer.named_state())
    into = {k: v.reshape(1) if v.ndim == 0 else v for k, v in tensors.items()}
    into["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        into["rng/cuda"] = torch.cuda.get_rng_state()
    load_tensors(folder / OPTIMIZER, into)
    torch.set_rng_state(into["rng/cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(into["rng/cuda"])
    return json.loads((folder / STATE).read_text())


def remove_unfinished(run: Path) -> None:
    """Delete what interrupted saves left. Only for the one process that writes to the run."""
    for path in (run / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(path)


def check_space(folder: Path, model: GPT, optimizer: MuonAdamW) -> None:
    tensors = [*model.state_dict().values(), *(t for _, t in optimizer.named_state())]
    needed = int(1.1 * sum(t.numel() * t.element_size() for t in tensors)) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"a checkpoint in {folder} takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        )


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

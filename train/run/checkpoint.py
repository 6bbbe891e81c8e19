"""Sharded checkpoints: safetensors and JSON, written in the background, hashed, committed by a rename.

A checkpoint is a model directory (see `hotlap.model.weights`) plus state.json, manifest.json and a subfolder
optimizer/, which also holds each rank's random state. Each rank writes its shards; any number of ranks can
load them. Beside a frozen base they hold the adapters alone. Files are written to a temporary folder, the
manifest last, then synced and renamed.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hotlap.common.errors import RankLost
from hotlap.common.files import file_sha256, sync
from hotlap.common.log import log
from hotlap.common.machine import versions
from hotlap.model.adapter_files import ADAPTER, save_lora
from hotlap.model.config import Shape
from hotlap.model.lora import LoRA, trained_weights
from hotlap.model.manifest import FORMAT, MANIFEST, manifest_text
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.model.weights import CHECKPOINTS, CONFIG, STATE, TOKENIZER, save_description
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.run.disk_space import checkpoint_bytes, explain_full_disk, require_space
from hotlap.train.run.folder import read_config
from hotlap.train.run.random_state import random_state
from hotlap.train.run.retention import best_score, move_aside, name_best, retire, score
from hotlap.train.run.state import RunState

T = TypeVar("T")
OPTIMIZER = "optimizer"
SAVE_TIMEOUT = timedelta(minutes=10)  # how long ranks wait for each other while saving


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training state at a step, which training no longer changes."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    config: Shape
    tokenizer: Tokenizer
    state: dict
    random: dict
    lora: LoRA | None
    best: dict | None
    """The metrics that make it the best checkpoint."""


class Saver:
    """Writes a run's checkpoints in the background; a context manager that every rank enters.

    `save` copies the state to CPU memory and returns. A thread writes the copy and communicates with the
    other ranks' threads over its own process group. If saving fails on any rank, the next `save`, `finish` or
    the end of the context raises the error on all ranks.
    """

    def __init__(self, run: Path, world: World):
        self.run, self.world = run, world
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.meshes: dict[DeviceMesh, DeviceMesh] = {}  # GPU mesh -> CPU mesh of the same ranks
        self.memory: dict[str, Tensor] = {}  # buffers for the copies, reused by each save
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.best: float | None = world.gather(best_score(run) if world.is_main else None)[0]

    def is_best(self, evaluated: dict) -> bool:
        """Whether a validation is better than that of the run's best checkpoint, on rank 0; collective. The
        caller then saves the step as the best, or names it so.
        """
        found = self.world.gather(score(evaluated))[0]
        if found is None or (self.best is not None and found <= self.best):
            return False
        self.best = found
        return True

    def name_best(self, step: int, evaluated: dict) -> None:
        """Name a step as the best that is saved, or is being saved."""
        self.finish()
        if self.world.is_main:
            name_best(self.run, step, evaluated)

    def save(
        self,
        model: Transformer,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        state: RunState,
        best: dict | None = None,
    ) -> None:
        """Start writing checkpoints/step-N, after waiting for the previous save. best: the validation that
        makes it the best one.
        """
        self.finish()
        weights, states = (
            {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            for tensors in (trained_weights(model), optimizer_tensors(optimizer))
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # wait for the copies
        snapshot = Snapshot(
            state.step, weights, states, model.config, tokenizer,
            json.loads(json.dumps(dataclasses.asdict(state))), random_state(), model.lora, best,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self.thread.start()

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor, or this rank's shard of one, to CPU memory; asynchronously from a GPU."""
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self.memory:
            self.memory[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        copy = self.memory[name].copy_(part, non_blocking=part.is_cuda)
        if not isinstance(tensor, DTensor):
            return copy
        return DTensor.from_local(
            copy, self._mesh_of_cpus(tensor.device_mesh), tensor.placements, run_check=False,
            shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip

    def _mesh_of_cpus(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self.meshes:
            self.meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self.meshes[mesh]

    def finish(self) -> None:
        """Wait until the last save is committed, and raise its error if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.finish()  # even after an error in training: keep the checkpoint that is being written
        except Exception as error:
            if kind is None:
                raise
            log.error("the last checkpoint was not saved either: %s", error)

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self.error = error

    def _write(self, snapshot: Snapshot) -> None:
        """Write and commit a checkpoint; collective over the saver's group."""
        step, rank = snapshot.step, self.world.rank
        partial = self._together(lambda: self._create_folder(snapshot))[0]
        if partial is None:
            return
        needed = checkpoint_bytes(snapshot.weights, snapshot.optimizer)
        try:
            with explain_full_disk(partial, needed):
                self._together(lambda: self._check_visible(partial, step))
                self._write_tensors(partial, snapshot.weights)
                self._together(lambda: fault("checkpoint-shards", rank, step))
                self._write_tensors(partial / OPTIMIZER, snapshot.optimizer)
                parts = self._together(lambda: self._write_files(partial, snapshot))
                files = {name: entry for part in parts for name, entry in sorted(part.items())}
                self._together(lambda: self._commit(partial, snapshot, files))
        except BaseException:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, action: Callable[[], T]) -> list[T]:
        return self.world.together(action, self.group)

    def _create_folder(self, snapshot: Snapshot) -> Path | None:
        """Check the snapshot; on rank 0, create the temporary folder, unless the step is already saved."""
        check_finite(snapshot)
        if not self.world.is_main:
            return None
        folder = self.run / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / f"step-{snapshot.step:06d}"
        if (final / MANIFEST).exists():  # saved by this process or the one it resumed from
            return None
        if final.exists():
            move_aside(final)
        require_space(folder, checkpoint_bytes(snapshot.weights, snapshot.optimizer))
        partial = folder / f".tmp-{final.name}-{secrets.token_hex(4)}"
        (partial / OPTIMIZER).mkdir(parents=True)
        return partial

    def _check_visible(self, partial: Path, step: int) -> None:
        fault("checkpoint-made", self.world.rank, step)
        if not partial.is_dir():
            raise ValueError(
                f"rank {self.world.rank} does not see {partial}; put the run's folder on a file system that "
                "all nodes share"
            )

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write this rank's shards to its own file."""
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.per_thread_copy_ahead = 0  # the copies are on the CPU; keep off training's CUDA stream
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        except dcp.CheckpointException as error:  # holds the failures by rank
            rank, (cause, _) = min(error.failures.items())
            if self.world.rank in error.failures:
                raise error.failures[self.world.rank][0] from None
            raise RankLost(f"rank {rank}: {cause}") from None

    def _write_files(self, partial: Path, snapshot: Snapshot) -> dict[str, dict]:
        """Write everything but tensors; return size and hash of each of this rank's files, by name."""
        number = f"{self.world.rank + 1:05d}"  # torch numbers shards from 1
        random = json.dumps(snapshot.random) + "\n"
        (partial / random_file(self.world.rank)).write_text(random, encoding="utf-8")
        mine = [partial / random_file(self.world.rank), *partial.rglob(f"shard-{number}-*")]
        if self.world.is_main:
            save_description(partial, snapshot.config, snapshot.tokenizer)
            (partial / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n", encoding="utf-8")
            mine += [partial / name for name in (CONFIG, TOKENIZER, STATE)]
            if snapshot.lora:
                save_lora(partial, snapshot.lora)
                mine.append(partial / ADAPTER)
        for path in mine:
            sync(path)
        return {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in mine
        }

    def _commit(self, partial: Path, snapshot: Snapshot, files: dict[str, dict]) -> None:
        """On rank 0: write the manifest, rename the folder to its final name, delete old checkpoints."""
        if not self.world.is_main:
            return
        step, folder = snapshot.step, partial.parent
        fault("checkpoint-manifest", 0, step)
        manifest = manifest_text(self._manifest(snapshot) | {"files": files})
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
        for path in (partial / MANIFEST, partial / OPTIMIZER, partial):
            sync(path)
        fault("checkpoint-rename", 0, step)
        partial.rename(folder / f"step-{step:06d}")
        sync(folder)
        fault("checkpoint-renamed", 0, step)
        if snapshot.best:
            name_best(self.run, step, snapshot.best)
        retire(self.run, lambda: fault("checkpoint-retention", 0, step))

    def _manifest(self, snapshot: Snapshot) -> dict:
        """The manifest, without its list of files."""
        return {
            "format": FORMAT,
            "step": snapshot.step,
            "world_size": self.world.size,
            "versions": versions(),
            "run": read_config(self.run) if (self.run / CONFIG).exists() else None,
            "tokenizer": snapshot.tokenizer.sha256,
            "data": snapshot.state.get("data"),
        }


def random_file(rank: int) -> str:
    return f"{OPTIMIZER}/random-{rank + 1:05d}.json"


def optimizer_tensors(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """The optimiser's state by name, sharing its memory; 0-d tensors are given one dimension."""
    return {name: t.reshape(1) if t.ndim == 0 else t for name, t in optimizer.named_state()}


def check_finite(snapshot: Snapshot) -> None:
    """Raise FloatingPointError if a weight or optimiser state on this rank is NaN or infinite."""
    for name, tensor in (snapshot.weights | snapshot.optimizer).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.isfinite().all():
            raise FloatingPointError(
                f"{name} is not finite after step {snapshot.step}, so it was not saved; the previous "
                "checkpoint is intact. Try a lower learning rate"
            )

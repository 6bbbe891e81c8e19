"""Checkpoints that a crash cannot spoil: safetensors and JSON, hashed, published by one rename.

A checkpoint is a model directory (see `hotlap.model.weights`) with state.json, manifest.json and a subfolder
optimizer/, which also holds the random state of each rank. Each rank writes its shards; any number of ranks
can read them. All is written under another name, the manifest last, and renamed when it is on the disk.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from hotlap.common.errors import DataError, RankLost
from hotlap.common.files import file_sha256, sync
from hotlap.common.log import log
from hotlap.common.options import differences
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.manifest import FORMAT, MANIFEST, manifest_text, verify
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import (
    CONFIG,
    STATE,
    TOKENIZER,
    listed,
    load_config,
    read_tensors,
    run_checkpoints,
    save_description,
    tensor_differences,
)
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.run.random_state import random_state, set_random_state
from hotlap.train.run.state import RunState

T = TypeVar("T")
FOLDER, OPTIMIZER = "checkpoints", "optimizer"
KEEP = 2  # newest checkpoints of a run
PATIENCE = timedelta(minutes=10)  # of ranks that wait for another's part of a checkpoint


@dataclass(frozen=True)
class Snapshot:
    """What training was at a step, in memory that training does not change any more."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    config: GPTConfig
    tokenizer: Tokenizer
    state: dict
    random: dict


class Saver:
    """Writes the checkpoints of a run while training goes on; a context, which every rank enters.

    `save` copies to CPU memory and returns. One thread writes the copy, and talks with the other ranks'
    threads over a process group of its own. What fails there, on whichever rank, is raised on all of them by
    the next `save`, by `finish`, or at the end of the context.
    """

    def __init__(self, run: Path, world: World):
        self.run, self.world = run, world
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.meshes: dict[DeviceMesh, DeviceMesh] = {}  # the CPUs of a mesh of GPUs
        self.memory: dict[str, Tensor] = {}  # for the copies, used again by each
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, model: GPT, optimizer: MuonAdamW, tokenizer: Tokenizer, state: RunState) -> None:
        """Begin to write checkpoints/step-N, once the one before is written."""
        self.finish()
        weights, states = (
            {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            for tensors in (model.state_dict(), optimizer_tensors(optimizer))
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # until the copies are there
        snapshot = Snapshot(
            state.step, weights, states, model.config, tokenizer,
            json.loads(json.dumps(dataclasses.asdict(state))), random_state(),
        )  # fmt: skip
        self.thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self.thread.start()

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or this rank's shard of one, in memory of the CPU; on its way there from a GPU."""
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self.memory:
            self.memory[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        copy = self.memory[name].copy_(part, non_blocking=True)
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
        """Wait until what was saved is published; raise what kept it from that."""
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
            self.finish()  # also amid another error: what was begun is not lost by it
        except Exception as error:
            if kind is None:
                raise
            log.error("the last checkpoint could not be written either: %s", error)

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._publish(snapshot)
        except BaseException as error:
            self.error = error

    def _publish(self, snapshot: Snapshot) -> None:
        """Every rank calls this, and in it every rank does the same as far as others wait for it."""
        step, rank = snapshot.step, self.world.rank
        partial = self._together(lambda: self._begin(snapshot))[0]
        if partial is None:
            return
        needed = checkpoint_bytes(snapshot.weights, snapshot.optimizer)
        try:
            with naming_space(partial, needed):
                self._together(lambda: self._see(partial, step))
                self._write_tensors(partial, snapshot.weights)
                self._together(lambda: fault("checkpoint-shards", rank, step))
                self._write_tensors(partial / OPTIMIZER, snapshot.optimizer)
                parts = self._together(lambda: self._write_rest(partial, snapshot))
                files = {name: entry for part in parts for name, entry in sorted(part.items())}
                self._together(lambda: self._complete(partial, snapshot, files))
        except BaseException:
            if self.world.leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, action: Callable[[], T]) -> list[T]:
        return self.world.together(action, self.group)

    def _begin(self, snapshot: Snapshot) -> Path | None:
        """Refuse what is not worth saving, and on rank 0 make the folder; None where the step is saved."""
        check_finite(snapshot)
        if not self.world.leads:
            return None
        folder = self.run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / f"step-{snapshot.step:06d}"
        if (final / MANIFEST).exists():  # by this process, or the one that this one goes on from
            return None
        if final.exists():
            set_aside(final)
        require_space(folder, checkpoint_bytes(snapshot.weights, snapshot.optimizer))
        partial = folder / f".tmp-{final.name}-{secrets.token_hex(4)}"
        (partial / OPTIMIZER).mkdir(parents=True)
        return partial

    def _see(self, partial: Path, step: int) -> None:
        fault("checkpoint-made", self.world.rank, step)
        if not partial.is_dir():
            raise ValueError(
                f"rank {self.world.rank} does not see {partial}; a run's folder has to be on a file system "
                "that all nodes share"
            )

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """This rank's shards, in a file of its own."""
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.per_thread_copy_ahead = 0  # of a GPU's tensors: there are none, and its stream is training's
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        except dcp.CheckpointException as error:  # with what went wrong on each rank
            rank, (cause, _) = min(error.failures.items())
            if self.world.rank in error.failures:
                raise error.failures[self.world.rank][0] from None
            raise RankLost(f"rank {rank}: {cause}") from None

    def _write_rest(self, partial: Path, snapshot: Snapshot) -> dict[str, dict]:
        """What is not a tensor; then size and hash of every file that this rank wrote, by name."""
        number = f"{self.world.rank + 1:05d}"  # as torch counts the shards
        (partial / random_file(self.world.rank)).write_text(json.dumps(snapshot.random) + "\n")
        mine = [partial / random_file(self.world.rank), *partial.rglob(f"shard-{number}-*")]
        if self.world.leads:
            save_description(partial, snapshot.config, snapshot.tokenizer)
            (partial / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n")
            mine += [partial / name for name in (CONFIG, TOKENIZER, STATE)]
        for path in mine:
            sync(path)
        return {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in mine
        }

    def _complete(self, partial: Path, snapshot: Snapshot, files: dict[str, dict]) -> None:
        """On rank 0: the manifest, the name that makes it a checkpoint, and an end to the oldest."""
        if not self.world.leads:
            return
        step, folder = snapshot.step, partial.parent
        fault("checkpoint-manifest", 0, step)
        (partial / MANIFEST).write_text(manifest_text(self._about(snapshot) | {"files": files}))
        for path in (partial / MANIFEST, partial / OPTIMIZER, partial):
            sync(path)
        fault("checkpoint-rename", 0, step)
        partial.rename(folder / f"step-{step:06d}")
        sync(folder)
        fault("checkpoint-renamed", 0, step)
        for old in run_checkpoints(self.run)[:-KEEP]:
            gone = old.rename(folder / f".tmp-{old.name}-{secrets.token_hex(4)}")  # no half of it looks whole
            fault("checkpoint-retention", 0, step)
            shutil.rmtree(gone)

    def _about(self, snapshot: Snapshot) -> dict:
        """What the manifest says of a checkpoint as a whole."""
        configuration = self.run / CONFIG
        return {
            "format": FORMAT,
            "step": snapshot.step,
            "world_size": self.world.size,
            "versions": {"hotlap": importlib.metadata.version("hotlap"), "torch": torch.__version__},
            "run": json.loads(configuration.read_text()) if configuration.exists() else None,
            "tokenizer": snapshot.tokenizer.sha256,
            "data": snapshot.state.get("data"),
        }


def verify_checkpoint(folder: Path, world: World) -> dict:
    """Its manifest, once the ranks have read and hashed every file, a share each. DataError, on all ranks,
    names what is missing or has changed.
    """
    return world.together(lambda: verify(folder, world.rank, world.size))[0]


def load_checkpoint(folder: Path, manifest: dict, model: GPT, optimizer: MuonAdamW, world: World) -> RunState:
    """Fill model, optimiser and random state, and return the run's. manifest: as verified.

    DataError lists, as `saved X, current Y`, the fields and tensors that differ; nothing is filled then, and
    nothing is cast. At another number of ranks than it was saved by, the random state stays as it is.
    """

    def fill() -> None:
        weights, states = model.state_dict(), optimizer_tensors(optimizer)
        saved, current = dataclasses.asdict(load_config(folder)), dataclasses.asdict(model.config)
        found = differences(saved, current, "model.") or (
            tensor_differences(folder, weights) + tensor_differences(folder / OPTIMIZER, states)
        )
        if found:
            raise DataError(f"{folder} does not fit this run: {listed(found)}")
        read_tensors(folder, weights)
        read_tensors(folder / OPTIMIZER, states)
        if manifest["world_size"] == world.size:
            set_random_state(json.loads((folder / random_file(world.rank)).read_text()))

    world.together(fill)
    if manifest["world_size"] != world.size:
        log.info(
            "%s was saved by %d ranks, and there are %d: all is as it was but the random state",
            folder, manifest["world_size"], world.size,
        )  # fmt: skip
    return RunState(**json.loads((folder / STATE).read_text()))


def random_file(rank: int) -> str:
    return f"{OPTIMIZER}/random-{rank + 1:05d}.json"


def optimizer_tensors(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """The optimiser's state by name, in tensors that share its memory; those of no dimension as one of 1."""
    return {name: t.reshape(1) if t.ndim == 0 else t for name, t in optimizer.named_state()}


def check_finite(snapshot: Snapshot) -> None:
    """FloatingPointError where a weight or state of the optimiser on this rank is NaN or infinite."""
    for name, tensor in (snapshot.weights | snapshot.optimizer).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.isfinite().all():
            raise FloatingPointError(
                f"{name} is not finite after step {snapshot.step}; that is not saved, and the checkpoint "
                "before it is whole. Try a lower learning rate"
            )


def remove_unfinished(run: Path) -> None:
    """Delete what interrupted saves left. Only for the one process that holds the run's lock."""
    for path in (run / FOLDER).glob(".tmp-step-*"):
        shutil.rmtree(path)


def set_aside(folder: Path) -> Path:
    """Take from a folder the name of a checkpoint, and return its new one."""
    return folder.rename(folder.with_name(f"aside-{folder.name}-{secrets.token_hex(4)}"))


def check_space(folder: Path, model: GPT, optimizer: MuonAdamW) -> None:
    """OSError with the numbers where a checkpoint does not fit on the disk of an existing folder."""
    require_space(folder, checkpoint_bytes(model.state_dict(), optimizer_tensors(optimizer)))


def checkpoint_bytes(*tensors: dict[str, Tensor]) -> int:
    """A bound on the size of a checkpoint of these tensors, all ranks' parts of them together."""
    return int(1.1 * sum(t.numel() * t.element_size() for part in tensors for t in part.values())) + (1 << 20)


def require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"a checkpoint in {folder} needs {needed:,} bytes, and {free:,} are free; make room, or name "
            "another --out"
        )


@contextmanager
def naming_space(folder: Path, needed: int) -> Iterator[None]:
    """Let the error of a full disk say where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"the disk is full: {folder} needs {needed:,} bytes, and {free:,} are free; make room, and go on "
            "from the checkpoint before it"
        ) from error

"""Resuming a run: finds its newest intact checkpoint, verifies it and loads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.options import differences
from hotlap.model.adapter_files import read_lora
from hotlap.model.lora import LoRA, trained_weights
from hotlap.model.manifest import verify
from hotlap.model.tensors import listed, read_tensors, tensor_differences
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.model.weights import CHECKPOINTS, STATE, TOKENIZER, load_config, model_folder, run_checkpoints
from hotlap.train.distributed.world import World
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.run.checkpoint import OPTIMIZER, optimizer_tensors, random_file
from hotlap.train.run.random_state import set_random_state
from hotlap.train.run.retention import move_aside
from hotlap.train.run.state import RunState


def resume_from(
    run: Path,
    choice: str,
    model: Transformer,
    optimizer: MuonAdamW,
    world: World,
    accept: Callable[[Path, dict, RunState], RunState] = lambda folder, manifest, state: state,
) -> RunState:
    """Load a checkpoint on all ranks and return its state, or the state of a new run.

    choice: "no"; "auto", the run's newest intact checkpoint, if it has any; or the path of a checkpoint or
    run, which is loaded or refused, never replaced by another. Damaged or later checkpoints of the run are
    renamed to aside-step-..., so that the run writes them again. accept: returns the state to go on with from
    a folder, its manifest and state, or raises ValueError before anything is loaded or renamed.
    """
    if world.is_main:
        remove_unfinished(run)
    found = world.together(lambda: run_checkpoints(run))[0]
    if choice == "no":
        if found:
            raise FileExistsError(
                f"{run} already holds checkpoints; resume with --resume auto, or choose another --out"
            )
        return RunState()
    if choice == "auto":
        folder, manifest = newest_intact(found, world)
        if folder is None:
            return RunState()
    else:
        folder = world.together(lambda: model_folder(choice))[0]
        manifest = verify_checkpoint(folder, world)
    check_same_tokenizer(run, folder, manifest)
    state = accept(folder, manifest, world.together(lambda: read_state(folder))[0])
    load_checkpoint(folder, manifest, model, optimizer, world)
    if world.is_main:
        for later in found:
            if int(later.name.removeprefix("step-")) >= state.step and not later.samefile(folder):
                log.warning("%s is renamed to %s", later, move_aside(later).name)
    log.info("%s: resuming after step %d from %s", run, state.step, folder)
    return state


def newest_intact(found: list[Path], world: World) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its manifest. Raises DataError if all are damaged."""
    for folder in reversed(found):
        try:
            return folder, verify_checkpoint(folder, world)
        except DataError as error:
            log.warning("%s; trying the previous checkpoint", error)
    if found:
        raise DataError(f"all checkpoints in {found[-1].parent} are damaged; start a new run")
    return None, {}


def check_same_tokenizer(run: Path, folder: Path, manifest: dict) -> None:
    """Raise DataError if the run and the checkpoint have different tokenizers."""
    if (run / TOKENIZER).exists():
        current = Tokenizer.load(run / TOKENIZER).sha256
        if current != manifest["tokenizer"]:
            raise DataError(
                f"{folder} has another tokenizer: saved sha256 {manifest['tokenizer'][:12]}..., current "
                f"{current[:12]}..."
            )


def remove_unfinished(run: Path) -> None:
    """Delete leftovers of interrupted saves. The caller must hold the run's lock."""
    for path in (run / CHECKPOINTS).glob(".tmp-step-*"):
        shutil.rmtree(path)


def verify_checkpoint(folder: Path, world: World) -> dict:
    """Hash all files, divided among the ranks, and return the manifest. Raises DataError on all ranks, naming
    a file that is missing or has changed.
    """
    return world.together(lambda: verify(folder, world.rank, world.size))[0]


def read_state(folder: Path) -> RunState:
    """A checkpoint's state.json. DataError if it cannot be used."""
    try:
        state = RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        for field in dataclasses.fields(RunState):
            if type(getattr(state, field.name)) is not type(getattr(RunState(), field.name)):
                raise ValueError(f"{field.name} is {getattr(state, field.name)!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / STATE} is not a checkpoint's state: {error}; use another checkpoint"
        ) from error
    return state


def adapter_facts(lora: LoRA | None) -> dict:
    """What must be the same of the adapters of a checkpoint and of the run that resumes from it."""
    if lora is None:
        return {"lora_rank": 0}
    return {"lora_rank": lora.rank, "lora_alpha": lora.alpha}


def restore_random_state(path: Path) -> None:
    """Set the random state from a checkpoint's file. DataError if it cannot be used."""
    try:
        set_random_state(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        raise DataError(f"{path} is not a random state: {error!r}; use another checkpoint") from error


def load_checkpoint(
    folder: Path, manifest: dict, model: Transformer, optimizer: MuonAdamW, world: World
) -> None:
    """Load model, optimiser and random state in place. manifest: as verified.

    Raises DataError, before changing anything, that lists fields and tensors that differ as `saved X, current
    Y`; nothing is cast. The random state is restored only on the same number of ranks.
    """

    def fill() -> None:
        weights, states = trained_weights(model), optimizer_tensors(optimizer)
        saved, current = dataclasses.asdict(load_config(folder)), dataclasses.asdict(model.config)
        lora = read_lora(folder)
        if lora and model.lora and lora.base_sha256 != model.lora.base_sha256:
            raise DataError(
                f"{folder} has adapters for other weights than {model.lora.bases[0]} has: saved sha256 "
                f"{lora.base_sha256[:12]}..., current {model.lora.base_sha256[:12]}...; --base must be what "
                f"they were trained beside, {lora.bases[0]}"
            )
        found = (
            differences(saved, current, "model.")
            or differences(adapter_facts(lora), adapter_facts(model.lora))
            or tensor_differences(folder, weights) + tensor_differences(folder / OPTIMIZER, states)
        )
        if found:
            raise DataError(f"{folder} does not fit this run: {listed(found)}")
        read_tensors(folder, weights)
        read_tensors(folder / OPTIMIZER, states)
        if manifest["world_size"] == world.size:
            restore_random_state(folder / random_file(world.rank))

    world.together(fill)
    if manifest["world_size"] != world.size:
        log.info(
            "%s was saved by %d ranks, this run has %d: everything is restored but the random state",
            folder, manifest["world_size"], world.size,
        )  # fmt: skip

"""Models and optimiser states to save and load, whole or sharded, and hashes of them."""

import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from helpers.ranks import Failed, in_world, run_ranks
from helpers.tools import tiny_config
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hotlap.model.gpt import GPT
from hotlap.model.tensors import read_tensors, stored_tensors
from hotlap.model.tokenizer import train_characters
from hotlap.model.weights import run_checkpoints
from hotlap.train.distributed.world import World
from hotlap.train.run.checkpoint import Saver
from hotlap.train.run.resume import resume_from, verify_checkpoint
from hotlap.train.run.state import RunState

SHAPE = {"vocab_size": 67, "layers": 1, "width": 32, "heads": 1, "kv_heads": 1, "context": 16}  # 67 is prime
TOKENIZER = train_characters("abc")


class States:
    """A stand-in for the optimiser with both kinds of state: sharded like parameters, or replicated."""

    def __init__(self, model: GPT):
        self.tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if name.startswith("blocks."):
                self.tensors[f"{name}/momentum"] = torch.zeros_like(parameter)
                self.tensors[f"{name}/second_moment"] = torch.zeros(len(parameter), 1)
            else:
                self.tensors[f"{name}/exp_avg"] = torch.zeros_like(parameter)
                self.tensors[f"{name}/step"] = torch.zeros(())

    def named_state(self):
        yield from self.tensors.items()


def built(mesh: tuple[int, ...] = (), **fields) -> tuple[GPT, States]:
    """A model and state, sharded over the last dimension of the mesh if one is given."""
    model = GPT(tiny_config(**(SHAPE | fields))).init_weights()
    if mesh:
        ranks = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
        for block in model.blocks:
            fully_shard(block, mesh=ranks)
        fully_shard(model, mesh=ranks)
    return model, States(model)


def everything(model: GPT, states: States) -> dict[str, Tensor]:
    return model.state_dict() | states.tensors


@torch.no_grad()
def fill(model: GPT, states: States, seed: int) -> None:
    """Fill all tensors with random numbers that depend only on the seed, not on the sharding."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(everything(model, states).items()):
        whole = torch.randn(tensor.shape, generator=generator)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(whole)


def digests(model: GPT, states: States) -> dict[str, str]:
    """sha256 of each whole tensor."""
    found = {}
    for name, tensor in everything(model, states).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = hashlib.sha256(whole.detach().numpy().tobytes()).hexdigest()
    return found


def save_steps(
    world: World, run: Path, steps: tuple[int, ...], mesh: tuple[int, ...] = (), seed: int = 0
) -> dict[int, dict[str, str]]:
    """Save a checkpoint with different numbers at each step, and return the hashes of each."""
    model, states = built(mesh)
    held = {}
    with Saver(run, world) as saver:
        for step in steps:
            fill(model, states, seed + step)
            held[step] = digests(model, states)
            saver.save(model, states, TOKENIZER, RunState(step=step, tokens=10 * step))
            fill(model, states, 0)  # training continues while it is written
    return held


def save_validated(world: World, run: Path, losses: dict[int, float]) -> list[bool]:
    """Save each step, as the best where its loss is; return where it was. The ranks have different losses."""
    model, states = built()
    found = []
    with Saver(run, world) as saver:
        for step, loss in losses.items():
            evaluated = {"validation_loss": loss if world.is_main else -loss}
            found.append(saver.is_best(evaluated))
            saver.save(model, states, TOKENIZER, RunState(step=step), evaluated if found[-1] else None)
    return found


def load_newest(
    world: World, run: Path, mesh: tuple[int, ...] = (), choice: str = "auto"
) -> tuple[int, dict[str, str]]:
    """Resume, and return the step and the hashes of all tensors."""
    model, states = built(mesh)
    state = resume_from(run, choice, model, states, world)
    return state.step, digests(model, states)


def saved(run: Path, *steps: int, size: int = 1, fault: str = "", **arguments) -> dict:
    """`save_steps` on new ranks; sharded if there are several."""
    mesh = arguments.pop("mesh", (size,) if size > 1 else ())
    seed = arguments.pop("seed", 0)
    return run_ranks(size, in_world, save_steps, run, steps, mesh, seed, env={"FAULT": fault}, **arguments)[0]


def killed(run: Path, *steps: int, fault: str, size: int = 1, **arguments) -> Failed:
    """`saved`, but one of the ranks is killed while saving."""
    try:
        saved(run, *steps, size=size, fault=fault, **arguments)
    except Failed as failure:
        assert "killed by signal 9" in failure.texts[int(fault.split(":")[1])], failure
        return failure
    raise AssertionError(f"no rank reached {fault}")


def assert_all_whole(world: World, run: Path) -> None:
    """Every folder with the name of a checkpoint is an intact one."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert folders == run_checkpoints(run)
    for folder in folders:
        verify_checkpoint(folder, world)


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_on(world: World, run: Path) -> tuple[float, ...]:
    """Save, and return the next number of each generator."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(world.rank)
    draws()
    save_steps(world, run, (1,), (world.size,))
    return draws()


def draw(world: World, run: Path) -> tuple[float, ...]:
    """Resume, and return the next number of each generator."""
    load_newest(world, run, (world.size,))
    return draws()


def state_in(run: Path) -> dict[str, str]:
    """sha256 of each tensor in a run's newest checkpoint. (Files differ in the order of their headers.)"""
    folder = run_checkpoints(run)[-1]
    found = {}
    for part in (folder, folder / "optimizer"):
        stored = stored_tensors(part)
        into = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored.items()}
        read_tensors(part, into)
        found |= {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in into.items()}
    return found

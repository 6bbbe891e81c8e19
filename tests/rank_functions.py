"""What tests run on several ranks."""

import torch
from tools import tiny_config

from hotlap.model.gpt import GPT
from hotlap.train.dist import World, joined
from hotlap.train.faults import fault
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.parallel import materialize, parallelize, whole


def agree(world: World) -> tuple:
    with world.leader_first("a test"):
        pass
    return world.total(world.rank, 1.0), world.gather({"rank": world.rank})


def fail_at(world: World, steps: int = 3) -> None:
    """Steps that all ranks take together, with a fault where FAULT says so."""
    for step in range(steps):
        fault("step", world.rank, step)
        world.total(1.0)


def waits(timeout: float) -> None:
    """As above, among ranks that wait so many seconds for each other."""
    with joined(timeout) as world:
        fail_at(world)


def train_steps(
    world: World, compute: str, recompute: str = "none", compile: bool = False, steps: int = 3
) -> dict:
    """Losses of steps of a small GPT that is spread over all ranks, and its weights after them."""
    config = tiny_config(layers=3, width=80, heads=1, kv_heads=1, context=16, vocab_size=301)
    with torch.device("meta"):
        model = GPT(config, getattr(torch, compute))
    parallelize(model, world, recompute, compile)
    materialize(model, world.device, seed=1)
    optimizer = MuonAdamW(model, OptimConfig())
    ids = torch.randint(0, 300, (steps, 12, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        rows = ids[step, world.rank :: world.size]
        loss = model(rows[:, :-1], rows[:, 1:])
        (loss / (12 * 16)).backward()
        losses.append(world.total(loss.item())[0] / (12 * 16))
        optimizer.step()
        optimizer.zero_grad()
    exchanges = [g["exchange"] for g in optimizer.param_groups if "exchange" in g]
    return {
        "losses": losses,
        "weights": {name: whole(p).detach().float().numpy() for name, p in model.named_parameters()},
        "owned": sum(len(e.owned[e.shard]) for e in exchanges),
        "moved": sum(e.moved for e in exchanges),
    }

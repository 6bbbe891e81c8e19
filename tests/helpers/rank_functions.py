"""Functions that tests run on several ranks."""

import torch
from helpers.tools import tiny_config
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import materialize, parallelize
from hotlap.train.distributed.world import World, joined
from hotlap.train.faults import fault
from hotlap.train.losses import next_token_loss
from hotlap.train.optim import muon_adamw
from hotlap.train.optim.exchange import Exchange
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.passes import Passes
from hotlap.train.step import take_step


def agree(world: World) -> tuple:
    with world.main_first("a test"):
        pass
    return world.total(world.rank, 1.0), world.gather({"rank": world.rank})


def fail_at(world: World, steps: int = 3) -> None:
    """Take steps together, with the faults of FAULT."""
    for step in range(steps):
        fault("step", world.rank, step)
        world.total(1.0)


def waits(timeout: float) -> None:
    """fail_at on ranks that wait this many seconds for each other."""
    with joined(timeout) as world:
        fail_at(world)


def train_steps(
    world: World, compute: str, recompute: str = "none", compile: bool = False, steps: int = 3
) -> dict:
    """Train a small GPT, sharded over all ranks; return its losses and final weights."""
    model = small_gpt(compute)
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
    return {
        "losses": losses,
        "weights": {name: whole(p).detach().float().numpy() for name, p in model.named_parameters()},
    }


def step_rows() -> torch.Tensor:
    """12 rows of 17 ids, of which a step predicts 16 each."""
    return torch.randint(0, 300, (12, 17), generator=torch.Generator().manual_seed(0))


def clipped_step(world: World, clip: float, silent: int | None = None) -> dict:
    """A step on `step_rows` in micro-batches of a row, sharded over all ranks, with clipped gradients.

    silent: a rank whose rows have no target.
    """
    model = small_gpt("float32")
    parallelize(model, world, "none", compile=False)
    materialize(model, world.device, seed=1)
    rows, speaks = step_rows()[world.rank :: world.size], world.rank != silent
    micro = [
        Batch(
            row[None, :-1], row[None, 1:] if speaks else torch.full((1, 16), IGNORE),
            torch.zeros(1, 16, dtype=torch.int64), 16 * speaks,
        )
        for row in rows
    ]  # fmt: skip
    (weight,) = world.total(sum(batch.weight for batch in micro))
    outcome = take_step(Passes(model, next_token_loss), micro, weight, clip, world)
    gradients = {name: whole(p.grad).numpy() for name, p in model.named_parameters()}
    return {"loss": outcome.loss, "norm": outcome.norm, "gradients": gradients}


class Gathers(TorchDispatchMode):
    """Counts the all-gathers in it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.c10d._allgather_base_.default
        return function(*args, **(kwargs or {}))


def gathers(world: World) -> tuple[int, int]:
    """All-gathers of a forward pass, and of the backward pass after it."""
    model = small_gpt("float32")
    parallelize(model, world, "none", compile=False)
    materialize(model, world.device, seed=1)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with Gathers() as forward:
        loss = model(ids, ids)
    with Gathers() as backward:
        loss.backward()
    return forward.count, backward.count


def gradients_that_autograd_sees(world: World) -> list[bool]:
    """Of the token embedding, in each of three micro-batches."""
    model = small_gpt("float32")
    parallelize(model, world, "none", compile=False)
    materialize(model, world.device, seed=1)
    seen = []
    model.embedding.weight.register_hook(lambda gradient: seen.append(gradient is not None))
    for i in range(3):
        model.embedding(torch.tensor([[i, 0]]), torch.float32, None).sum().backward()
    assert model.embedding.weight.grad[:4, 0].tolist() == [4, 1, 1, 0]
    return seen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def small_gpt(compute: str) -> GPT:
    """On the meta device, with matrices whose rows no number of ranks divides, and a gate with one row."""
    config = tiny_config(layers=3, width=80, heads=1, kv_heads=1, context=16, vocab_size=301)
    with torch.device("meta"):
        return GPT(config, getattr(torch, compute))


def muon_steps(world: World, steps: int = 3) -> dict:
    """Take steps on random gradients; return the weights, and how much each rank computed and sent."""
    model = small_gpt("float32")
    parallelize(model, world, "none", compile=False)
    materialize(model, world.device, seed=1)
    optimizer = MuonAdamW(model, OptimConfig(weight_decay=0.5))
    orthogonalized = 0

    def counted(x, norm):
        nonlocal orthogonalized
        orthogonalized += len(x)
        return orthogonalize(x, norm=norm)

    orthogonalize, muon_adamw.orthogonalize = muon_adamw.orthogonalize, counted
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                where = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *where, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    exchanges = [group["exchange"] for group in optimizer.param_groups if "exchange" in group]
    return {
        "weights": {name: whole(p).detach().numpy() for name, p in model.named_parameters()},
        "orthogonalized": orthogonalized,
        "moved": sum(exchange.moved for exchange in exchanges),
        "least": steps * sum(map(least_bytes, exchanges)),
    }


def least_bytes(exchange: Exchange) -> int:
    """Bytes that this rank must send for one group: its rows to their owners in the replica, the rows and
    squares of its own matrices to the others there, and the replica's results to the other replicas.
    """
    (M, N), mesh = exchange.shape, exchange.mesh
    shards, m = mesh.size(mesh.ndim - 1), exchange.rows[exchange.shard]
    mine = len(exchange.owned[exchange.shard])
    here = sum(map(len, exchange.owned))
    squares = max(M, N)
    there = (here - mine) * m * N
    back = mine * (M - m) * N + mine * squares * (shards - 1)
    copies = (mesh.size() // shards - 1) * here * (m * N + squares)
    return 4 * (there + back + copies)

"""One training step: gradients accumulated over micro-batches and ranks, averaged over the step's weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hotlap.common.gpu import widest
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import local, replica_count, set_gradient_sync
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule
from hotlap.train.passes import Passes

WARMUP_STEPS = 2  # per stage: the second step finds what the first has left, such as gradients that are None


@dataclass(frozen=True)
class Outcome:
    """Result of a step. All but `own_loss` is equal on all ranks."""

    loss: float  # summed over all ranks, divided by the step's weight
    norm: float  # of that loss's gradient, before clipping
    metrics: dict[str, float]  # the loss function's other sums, divided by the weight
    own_loss: float  # this rank's sum of the loss


def take_step(
    passes: Passes, micro: list[Batch], weight: float, clip: float, world: World, step: int = 0
) -> Outcome:
    """Compute the gradients of the summed loss divided by `weight`, that of all batches on all ranks."""
    if weight == 0:
        raise ValueError("this step has no targets: the loss mask excludes every row of its batch")
    model, own = passes.model, 0.0
    metrics: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro):
        set_gradient_sync(model, i, len(micro))
        broken = float("nan") if i == 0 and fault("loss", world.rank, step) == "nan" else 1.0
        value, found = passes(batch, broken * weight)
        own = own + broken * value  # in the dtype of the loss's sum
        metrics = {name: metrics.get(name, 0) + tensor for name, tensor in found.items()}
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if action := fault("gradient", world.rank, step):
        torch._foreach_mul_(gradients, {"nan": float("nan"), "grow": 1000.0}[action])
    norm = torch.nn.utils.get_total_norm(gradients)  # of this rank's rows; its replicas hold the same
    wide = widest(own.device)
    own, square = own.to(wide), norm.to(wide).square() / replica_count(model)
    sums = torch.stack([own, square, *(m.to(wide) for m in metrics.values())])
    if world.size > 1:
        dist.all_reduce(sums)
    *totals, mine = torch.cat((sums, own[None])).tolist()
    total, square, *means = totals
    norm = square**0.5
    if clip and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)
    means = {name: mean / weight for name, mean in zip(metrics, means, strict=True)}
    return Outcome(total / weight, norm, means, mine)


@torch.no_grad()
def take_warmup_steps(
    passes: Passes,
    optimizer: MuonAdamW,
    schedule: ScheduleConfig,
    batches: Iterator[list[Batch]],
    world: World,
) -> Iterator[list[Batch]]:
    """Compile everything before the clock starts: take steps on a real batch in every stage of the schedule,
    then restore weights and optimiser state. Returns all batches, the one used here included.
    """
    model = passes.model
    tensors = [local(t) for t in itertools.chain(model.parameters(), (t for _, t in optimizer.named_state()))]
    before = [tensor.to("cpu", copy=True) for tensor in tensors]
    first = next(batches)
    micro = [batch.to(world.device) for batch in first]
    (weight,) = world.total(sum(batch.weight for batch in micro))
    for i in range(len(schedule.stages)):
        set_schedule(model, optimizer, schedule, 0, i / len(schedule.stages))
        for _ in range(WARMUP_STEPS):
            with torch.enable_grad():
                take_step(passes, micro, weight, 0.0, world, step=-1)
            optimizer.step()
            optimizer.zero_grad()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return itertools.chain((first,), batches)

"""The gradient of one step: micro-batches on every rank, and one mean over all of their targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import accumulate, local, replicas
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule


@dataclass(frozen=True)
class Outcome:
    """Of a step, equal on all ranks but for `own`."""

    loss: float  # mean over all targets
    norm: float  # of the gradient of that, before it is clipped
    own: float  # sum of the loss over the targets of this rank


def take_step(
    model: GPT,
    micro: list[Batch],
    loss_fn: Callable[[GPT, Batch], Tensor],
    weight: float,
    clip: float,
    world: World,
    step: int = 0,
) -> Outcome:
    """Gradients of the sum of the losses divided by weight, the number of targets on all ranks."""
    if weight == 0:
        raise ValueError("a step without a single target; every row of its batch is masked")
    own = torch.zeros((), device=world.device)
    for i, batch in enumerate(micro):
        accumulate(model, i, len(micro))
        loss = loss_fn(model, batch)
        if i == 0 and fault("loss", world.rank, step) == "nan":
            loss = loss * float("nan")
        (loss / weight).backward()
        own += loss.detach()
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if action := fault("gradient", world.rank, step):
        torch._foreach_mul_(gradients, {"nan": float("nan"), "grow": 1000.0}[action])
    norm = torch.nn.utils.get_total_norm(gradients)  # of this rank's rows, which its replicas have too
    sums = torch.stack((own.double(), norm.double().square() / replicas(model)))
    if world.size > 1:
        dist.all_reduce(sums)
    total, square, mine = torch.cat((sums, own.double()[None])).tolist()
    norm = square**0.5
    if clip and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)
    return Outcome(total / weight, norm, mine)


REHEARSALS = 2  # of each stage: the second meets what the first has left, such as gradients that are None


@torch.no_grad()
def rehearsed(
    model: GPT,
    optimizer: MuonAdamW,
    schedule: ScheduleConfig,
    batches: Iterator[list[Batch]],
    loss_fn: Callable[[GPT, Batch], Tensor],
    world: World,
) -> Iterator[list[Batch]]:
    """Take steps of every stage of the schedule, with a real batch, and leave model, optimiser and batches as
    they were: what it returns yields all batches, from the first on.
    """
    tensors = [local(t) for t in itertools.chain(model.parameters(), (t for _, t in optimizer.named_state()))]
    before = [tensor.to("cpu", copy=True) for tensor in tensors]
    first = next(batches)
    micro = [batch.to(world.device) for batch in first]
    (weight,) = world.total(sum(batch.weight for batch in micro))
    for i in range(len(schedule.stages)):
        set_schedule(model, optimizer, schedule, 0, i / len(schedule.stages))
        for _ in range(REHEARSALS):
            with torch.enable_grad():
                take_step(model, micro, loss_fn, weight, 0.0, world, step=-1)
            optimizer.step()
            optimizer.zero_grad()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return itertools.chain((first,), batches)

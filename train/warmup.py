"""Steps that are taken before the clock starts, and undone: they compile what the run will need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hotlap.model.gpt import GPT
from hotlap.train.data import Batch
from hotlap.train.dist import World
from hotlap.train.optim import MuonAdamW
from hotlap.train.parallel import local
from hotlap.train.schedule import ScheduleConfig, set_schedule
from hotlap.train.step import take_step

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

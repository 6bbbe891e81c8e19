"""The gradient of one step: micro-batches on every rank, and one mean over all of their targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hotlap.model.gpt import GPT
from hotlap.train.data import Batch
from hotlap.train.dist import World
from hotlap.train.faults import fault
from hotlap.train.parallel import accumulate, local, replicas


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

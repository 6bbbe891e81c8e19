"""Checks for NaN or infinite losses and gradients, for spikes, and for copies that differ between ranks.

Loss and gradient norm are equal on all ranks, so all ranks decide alike without communication. A spike is
defined as in OLMo's skip-step optimiser: more than six standard deviations above the mean of the last 128
steps.
"""

from __future__ import annotations

import hashlib
import math
import statistics

import torch
from torch.distributed.tensor import DTensor

from hotlap.common.errors import RankLost
from hotlap.common.log import log
from hotlap.model.transformer import Transformer
from hotlap.train.config import Policy
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.sharding import local, replica_count
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.step import Outcome

WINDOW, MIN_HISTORY, SIGMAS = 128, 32, 6.0
MAX_SKIPPED = 10  # consecutive skipped steps after which the run stops


class StepChecker:
    """Decides whether to take a step. `recent`: losses and norms of the last steps, updated in place."""

    def __init__(self, policy: Policy, recent: dict[str, list[float]]):
        self.policy, self.recent = policy, recent
        self.skipped_in_a_row = 0

    def accepts(
        self, world: World, step: int, outcome: Outcome, model: Transformer, micro: list[Batch]
    ) -> bool:
        """Whether to update the weights; collective. Raises FloatingPointError if the run must stop."""
        finite = math.isfinite(outcome.loss) and math.isfinite(outcome.norm)
        if finite:
            problem = self.spike(step, outcome)
        else:
            problem = describe_nonfinite(world, step, outcome, model, micro)
        if finite and (not problem or self.policy == "stop"):
            if problem:
                log.warning("%s; --loop.bad-steps skip would skip it", problem)
            self._record(outcome)
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.policy == "stop" or self.skipped_in_a_row == MAX_SKIPPED:
            often = f"; {MAX_SKIPPED} bad steps in a row" if self.policy == "skip" else ""
            raise FloatingPointError(
                f"{problem}{often}; the last checkpoint is intact. Try a lower learning rate"
                + ("" if often else ", or --loop.bad-steps skip")
            )
        log.warning("%s; skipping the step", problem)
        return False

    def spike(self, step: int, outcome: Outcome) -> str:
        """Describe a spike of the loss or the gradient norm; "" if there is none."""
        for name, value in (("loss", outcome.loss), ("norm", outcome.norm)):
            past = self.recent[name]
            if len(past) < MIN_HISTORY:
                continue
            mean, deviation = statistics.fmean(past), statistics.pstdev(past)
            if value > mean + SIGMAS * deviation:
                what = "gradient norm" if name == "norm" else name
                above = (value - mean) / max(deviation, 1e-30)
                return (
                    f"{what} {value:.4g} at step {step} is {above:.1f} standard deviations above the mean of "
                    f"the last {len(past)} steps, {mean:.4g}"
                )
        return ""

    def _record(self, outcome: Outcome) -> None:
        for name, value in (("loss", outcome.loss), ("norm", outcome.norm)):
            self.recent[name] = [*self.recent[name], value][-WINDOW:]


def describe_nonfinite(
    world: World, step: int, outcome: Outcome, model: Transformer, micro: list[Batch]
) -> str:
    """Describe which ranks have a NaN or infinite loss or gradient, and on which batch."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    finite = all(bool(g.isfinite().all()) for g in gradients)
    found = world.gather({"loss": outcome.own_loss, "finite": finite, "batch": batch_name(micro)})
    reports = [
        f"rank {rank} has {what} on batch {report['batch']}"
        for rank, report in enumerate(found)
        for what in (
            [f"loss {report['loss']}"] if not math.isfinite(report["loss"])
            else ["a gradient that is not finite"] if not report["finite"] else []
        )
    ]  # fmt: skip
    losses = [text for text in reports if "loss" in text]
    return f"loss {outcome.loss:.4g}, gradient norm {outcome.norm:.4g} at step {step}: " + ", ".join(
        losses or reports
    )


def batch_name(micro: list[Batch]) -> str:
    """Identify a batch: the first digits of the sha256 of its token ids, and its weight."""
    digest = hashlib.sha256()
    for batch in micro:
        digest.update(batch.inputs.cpu().numpy().tobytes())
    weight = f"(weight {sum(batch.weight for batch in micro):g})"
    return f"{digest.hexdigest()[:12]} {weight}{''.join(batch.about() for batch in micro)}"


def check_copies(world: World, model: Transformer, optimizer: MuonAdamW, step: int) -> None:
    """Raise RankLost, naming rank and tensor, if copies that should be equal differ between ranks.

    Compares the optimiser state that every rank keeps whole, the model's buffers, and, between replicas,
    every shard. Nothing else would reveal a flipped bit in one copy.
    """
    if world.size == 1:
        return
    tensors = dict(model.named_buffers()) | dict(optimizer.named_state()) | dict(model.named_parameters())
    if replica_count(model) == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    if fault("copies", world.rank, step) == "flip":
        next(t for t in tensors.values() if not isinstance(t, DTensor)).view(-1)[0] += 1
    mine = {name: (shard_index(tensor), checksum(local(tensor))) for name, tensor in tensors.items()}
    found = world.gather(mine)
    for name in mine:
        copies: dict[int, dict[int, list[int]]] = {}  # shard -> checksum -> ranks
        for rank, theirs in enumerate(found):
            place, value = theirs[name]
            copies.setdefault(place, {}).setdefault(value, []).append(rank)
        for values in copies.values():
            if len(values) > 1:
                odd = ", ".join(map(str, min(values.values(), key=len)))
                raise RankLost(
                    f"{name} differs between ranks at step {step}: rank {odd} holds another copy. Its memory "
                    "cannot be trusted; resume from an earlier checkpoint without that machine"
                )


def shard_index(tensor: torch.Tensor) -> int:
    """Index of this rank's shard of a tensor; 0 if every rank holds it whole."""
    if not isinstance(tensor, DTensor):
        return 0
    return tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1)


def checksum(tensor: torch.Tensor) -> int:
    """Order-sensitive checksum of the bits of a float32 tensor."""
    bits = tensor.detach().reshape(-1).view(torch.int32).long()
    return int((bits * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum())

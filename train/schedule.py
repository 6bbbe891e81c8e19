"""Learning rate, Muon's momentum and weight decay as pure functions of the step (nanochat's shapes)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hotlap.train.optim import MuonAdamW


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of a run's schedule. Rates are multiples of their peaks."""

    warmup_steps: int = 40
    """Steps over which the learning rate rises linearly from 0."""
    warmdown: float = 0.65
    """Last share of the run over which the learning rate falls linearly."""
    final_lr: float = 0.05
    """Share of the peak learning rate at the end."""
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    """Muon's momentum at the start, after its warm-up, and at the end of the warmdown."""
    momentum_warmup_steps: int = 400

    def validate(self, steps: int) -> ScheduleConfig:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if not 0 <= self.warmdown <= 1 or not 0 <= self.final_lr <= 1:
            raise ValueError(f"warmdown={self.warmdown} and final_lr={self.final_lr} must be from 0 to 1")
        if self.warmup_steps < 0 or self.momentum_warmup_steps < 1:
            raise ValueError("warmup_steps must be 0 or more, momentum_warmup_steps at least 1")
        if not all(0 <= momentum < 1 for momentum in self.momentum):
            raise ValueError(f"momentum={self.momentum} must be three numbers from 0 to less than 1")
        return self


def lr_share(config: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps`."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return rise * (config.final_lr + (1 - config.final_lr) * left_of_warmdown(config, step, steps))


def left_of_warmdown(config: ScheduleConfig, step: int, steps: int) -> float:
    """1 before the warmdown, falling linearly to 0 at the end of the run."""
    length = config.warmdown * steps
    return min(1.0, (steps - step) / length) if length else 1.0


def momentum_at(config: ScheduleConfig, step: int, steps: int) -> float:
    """Muon's momentum: a linear rise, then a linear fall along with the learning rate."""
    first, top, last = config.momentum
    rising = first + (top - first) * min(1.0, step / config.momentum_warmup_steps)
    falling = last + (top - last) * left_of_warmdown(config, step, steps)
    return min(rising, falling)


def decay_share(step: int, steps: int) -> float:
    """Share of the peak weight decay: half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def set_schedule(optimizer: MuonAdamW, config: ScheduleConfig, step: int, steps: int) -> float:
    """Set the optimiser up for `step`, and return the share of the peak learning rate."""
    share = lr_share(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
        if group["muon"]:
            group["weight_decay"] = group["peak_weight_decay"] * decay_share(step, steps)
    optimizer.momentum = momentum_at(config, step, steps)
    return share

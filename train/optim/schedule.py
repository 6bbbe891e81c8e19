"""Learning rate, Muon's momentum, weight decay, batch and attention windows as pure functions of the place in
a run: its step, and the share of it that is over (nanochat's shapes; stages as in modded-nanogpt).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hotlap.model.gpt import GPT
from hotlap.train.optim.muon_adamw import MuonAdamW


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
    stages: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """Equal parts of the run: the share of the step's rows, and of the attention windows, in each. Rates are
    multiplied by the square root of the former.
    """

    def validate(self, minutes: float = 0.0) -> ScheduleConfig:
        """Return self, or raise ValueError naming what cannot work. minutes: of a run that ends by them."""
        if not 0 <= self.warmdown <= 1 or not 0 <= self.final_lr <= 1:
            raise ValueError(f"warmdown={self.warmdown} and final_lr={self.final_lr} must be from 0 to 1")
        if self.warmup_steps < 0 or self.momentum_warmup_steps < 1:
            raise ValueError("warmup_steps must be 0 or more, momentum_warmup_steps at least 1")
        if not all(0 <= momentum < 1 for momentum in self.momentum):
            raise ValueError(f"momentum={self.momentum} must be three numbers from 0 to less than 1")
        if not self.stages or not all(0 < share <= 1 for stage in self.stages for share in stage):
            raise ValueError(f"stages={self.stages} must be pairs of numbers above 0, up to 1")
        if self.stages[-1] != (1.0, 1.0):
            raise ValueError(f"stages={self.stages} must end with (1, 1), the whole batch and whole windows")
        if minutes and any(rows != 1 for rows, _ in self.stages):
            raise ValueError(
                "a run that ends by its minutes has steps of one size; stages may change windows"
            )
        return self


def stage_at(config: ScheduleConfig, done: float) -> tuple[float, float]:
    """Shares of the step's rows and of the windows, where a share `done` of the run is over."""
    return config.stages[min(int(done * len(config.stages)), len(config.stages) - 1)]


def stage_rows(config: ScheduleConfig, batch_rows: int) -> list[int]:
    """Rows of a step in each stage, or a ValueError where that is no whole number."""
    rows = [round(batch_rows * share) for share, _ in config.stages]
    if any(abs(n - batch_rows * share) > 0.01 * n for n, (share, _) in zip(rows, config.stages, strict=True)):
        raise ValueError(f"batch_rows={batch_rows} has no such shares as stages={config.stages} want")
    return rows


def rows_share(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The share of the batch's rows that a step takes, in a run of so many steps."""
    return lambda step: stage_at(config, step / steps)[0]


def rows_in_all(config: ScheduleConfig, batch_rows: int, steps: int) -> int:
    """Rows of all steps of a run together."""
    return sum(round(batch_rows * share) for share in map(rows_share(config, steps), range(steps)))


def lr_share(config: ScheduleConfig, step: int, done: float) -> float:
    """Share of the peak learning rate at `step`, where a share `done` of the run is over."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    fall = config.final_lr + (1 - config.final_lr) * left_of_warmdown(config, done)
    return rise * fall * stage_at(config, done)[0] ** 0.5


def left_of_warmdown(config: ScheduleConfig, done: float) -> float:
    """1 before the warmdown, falling linearly to 0 at the end of the run."""
    return min(1.0, (1 - done) / config.warmdown) if config.warmdown else 1.0


def momentum_at(config: ScheduleConfig, step: int, done: float) -> float:
    """Muon's momentum: a linear rise, then a linear fall along with the learning rate."""
    first, top, last = config.momentum
    rising = first + (top - first) * min(1.0, step / config.momentum_warmup_steps)
    falling = last + (top - last) * left_of_warmdown(config, done)
    return min(rising, falling)


def decay_share(done: float) -> float:
    """Share of the peak weight decay: half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def set_schedule(model: GPT, optimizer: MuonAdamW, config: ScheduleConfig, step: int, done: float) -> float:
    """Set model and optimiser up for `step`, and return the share of the peak learning rate."""
    share = lr_share(config, step, done)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
        if group["muon"]:
            group["weight_decay"] = group["peak_weight_decay"] * decay_share(done)
    optimizer.momentum = momentum_at(config, step, done)
    model.set_windows(stage_at(config, done)[1])
    return share

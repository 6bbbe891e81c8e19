"""Learning rate, Muon's momentum, weight decay, batch size and attention windows, as pure functions of the
step and the completed fraction of the run. The shapes are nanochat's, the stages modded-nanogpt's.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hotlap.common.checks import at_least, between

if TYPE_CHECKING:
    from hotlap.model.transformer import Transformer
    from hotlap.train.optim.muon_adamw import MuonAdamW


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, momentum, batch size and attention windows over the run."""

    warmup_steps: int = 40
    """Steps of linear learning-rate warmup."""
    warmdown: float = 0.65
    """Fraction of the run, at its end, over which the learning rate decays."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rate decays: along a line, or half a cosine."""
    final_lr: float = 0.05
    """Final learning rate, as a fraction of the peak."""
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    """Muon's momentum at the start, after its warmup, and at the end of the warmdown."""
    momentum_warmup_steps: int = 400
    """Steps of linear warmup of Muon's momentum."""
    stages: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """Batch size and attention windows in equal parts of the run, as fractions of the full ones.
    Learning rates scale with the square root of the batch size."""

    def validate(self, minutes: float = 0.0) -> ScheduleConfig:
        """Return self, or raise ValueError naming the invalid field. minutes: LoopConfig's."""
        between(self, 0, 1, "warmdown", "final_lr")
        at_least(self, 0, "warmup_steps")
        at_least(self, 1, "momentum_warmup_steps")
        if not all(0 <= momentum < 1 for momentum in self.momentum):
            raise ValueError(f"momentum={self.momentum} must be three numbers from 0 to less than 1")
        if not self.stages or not all(0 < share <= 1 for stage in self.stages for share in stage):
            raise ValueError(f"stages={self.stages} must be pairs of numbers above 0, up to 1")
        if self.stages[-1] != (1.0, 1.0):
            raise ValueError(f"stages={self.stages} must end with (1, 1), the full batch and full windows")
        if minutes and any(rows != 1 for rows, _ in self.stages):
            raise ValueError(
                "with minutes, all steps must have the same batch size; stages may only change windows"
            )
        return self


def stage_at(config: ScheduleConfig, done: float) -> tuple[float, float]:
    """Batch size and windows, as fractions, at the completed fraction `done` of the run."""
    place = int(done * len(config.stages) + 1e-9)  # 48 / 49 * 49 is less than 48
    return config.stages[min(place, len(config.stages) - 1)]


def stage_rows(config: ScheduleConfig, batch_rows: int) -> list[int]:
    """Rows of a step in each stage. Raises ValueError if that is not a whole number."""
    rows = [round(batch_rows * share) for share, _ in config.stages]
    if any(abs(n - batch_rows * share) > 0.01 * n for n, (share, _) in zip(rows, config.stages, strict=True)):
        raise ValueError(
            f"batch_rows={batch_rows} times the fractions in stages={config.stages} must be whole"
        )
    return rows


def rows_share(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """Return a function of the step: the fraction of batch_rows that it takes. steps: of the whole run."""
    return lambda step: stage_at(config, step / steps)[0]


def rows_in_all(config: ScheduleConfig, batch_rows: int, steps: int) -> int:
    """Rows of all steps of a run."""
    rows, n = stage_rows(config, batch_rows), len(config.stages)
    starts = [bisect_left(range(steps), i, key=lambda step: int(step / steps * n)) for i in range(n)]
    ends = [*starts[1:], steps]
    return sum(r * (end - start) for r, start, end in zip(rows, starts, ends, strict=True))


def lr_share(config: ScheduleConfig, step: int, done: float) -> float:
    """Fraction of the peak learning rate at `step` and the completed fraction `done` of the run."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = warmdown_factor(config, done)
    if config.decay == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    fall = config.final_lr + (1 - config.final_lr) * left
    return rise * fall * stage_at(config, done)[0] ** 0.5


def warmdown_factor(config: ScheduleConfig, done: float) -> float:
    """1 before the warmdown, then falling linearly to 0 at the end of the run."""
    return min(1.0, (1 - done) / config.warmdown) if config.warmdown else 1.0


def momentum_at(config: ScheduleConfig, step: int, done: float) -> float:
    """Muon's momentum: linear warmup, then linear decay during the warmdown."""
    first, top, last = config.momentum
    rising = first + (top - first) * min(1.0, step / config.momentum_warmup_steps)
    falling = last + (top - last) * warmdown_factor(config, done)
    return min(rising, falling)


def decay_share(done: float) -> float:
    """Fraction of the peak weight decay: cosine decay from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def set_schedule(
    model: Transformer, optimizer: MuonAdamW, config: ScheduleConfig, step: int, done: float
) -> float:
    """Set model and optimiser up for `step`, and return the fraction of the peak learning rate."""
    share = lr_share(config, step, done)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
        if group["muon"]:
            group["weight_decay"] = group["peak_weight_decay"] * decay_share(done)
    optimizer.momentum = momentum_at(config, step, done)
    model.set_windows(stage_at(config, done)[1])
    return share

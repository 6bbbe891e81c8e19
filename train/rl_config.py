"""What configures `hotlap rl`. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from hotlap.common.checks import at_least, positive, refuse
from hotlap.train.config import LATER_OPTIM, LATER_SCHEDULE, LoopConfig, OptimConfig, TuneConfig
from hotlap.train.optim.schedule import ScheduleConfig

PolicyLoss = Literal["dapo", "dr_grpo", "gspo", "cispo"]
MOST_REWARD_SECONDS = 86400.0  # an alarm takes some more
# How far the ratio of probabilities may fall below 1 and rise above it before a loss clips it.
CLIPS = {"dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (0.0, 4.0)}


@dataclass(frozen=True)
class RLConfig(TuneConfig):
    """Train a chat model on its own answers, by rewards that can be computed (a row is one answer)."""

    out: Path = Path("runs/rl")
    model_field: ClassVar[str] = "base"
    base: Path = Path("runs/sft")
    """Chat model to start from: a run or model directory."""
    data: tuple[str, ...] = ("names",)
    """What to ask: names (of Python, known or not), spelling, sums (without the calculator), arithmetic (with
    it), gsm8k, mbpp (downloads), reasoning-gym:TASK; or .jsonl or .parquet files, which need --reward."""
    reward: str | None = None
    """package.module:function of your own, called with an answer and the record of its question."""
    tools: tuple[str, ...] = ("calculator",)
    """Tools that answers to the questions of files may call: calculator, python. Other data has its own."""
    batch_rows: int = 128
    """Answers per step over all ranks."""
    samples: int = 8
    """Answers to each question; their rewards are compared with each other."""
    max_tokens: int = 128
    """Longest answer, in tokens."""
    loss: PolicyLoss = "dapo"
    """dapo: all tokens of a step weigh the same. dr_grpo, gspo, cispo: see docs/rl.md."""
    updates: int = 1
    """Optimiser steps for each set of answers. With more than one, the ratio to the policy that gave them is
    clipped."""
    clip_low: float | None = None
    """How far the ratio may fall below 1; 0: as far as it does. By default the loss's own."""
    clip_high: float | None = None
    """How far the ratio may rise above 1; 0: as far as it does. By default the loss's own."""
    kl: float = 0.0
    """Weight of the divergence from the base (k3); above 0, a copy of the base stays in memory."""
    resample: int = 1
    """Times that other questions replace those whose answers all have the same reward."""
    reward_seconds: float = 10.0
    """Time limit for the reward of an answer; beyond it, the answer is left out."""
    validation_questions: int = 128
    """Held-out questions of each validation; 0: no validation."""
    temperature: float = 1.0
    """Must be 1: answers drawn in another way are not the policy's, and the ratio would be biased."""
    top_k: int = 0
    """Must be 0, for the same reason."""
    top_p: float = 1.0
    """Must be 1, for the same reason."""
    min_p: float = 0.0
    """Must be 0, for the same reason."""
    optim: OptimConfig = LATER_OPTIM
    schedule: ScheduleConfig = LATER_SCHEDULE
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(150, evaluate_every=50, save_every=50))

    @property
    def clips(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1 before it is clipped; 0: as far as it does."""
        given = self.clip_low, self.clip_high
        return tuple(
            own if value is None else value for value, own in zip(given, CLIPS[self.loss], strict=True)
        )

    def validate(self) -> RLConfig:
        super().validate()
        for name, needed in (("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name}={getattr(self, name):g} must be {needed}: answers drawn in another way are not "
                    "the policy's, whose log-probabilities are trained on"
                )
        at_least(self, 2, "samples")
        at_least(self, 1, "max_tokens", "updates")
        at_least(self, 0, "kl", "resample", "validation_questions")
        positive(self, "reward_seconds")
        if self.reward_seconds > MOST_REWARD_SECONDS:
            refuse(self, "reward_seconds", f"at most {MOST_REWARD_SECONDS:g} (a day)")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                at_least(self, 0, name, zero="off")
        if self.clip_low is not None and self.clip_low >= 1:
            refuse(self, "clip_low", "less than 1: a ratio is never below 0")
        if self.clip_low and self.loss == "cispo":
            refuse(self, "clip_low", "left out for --loss cispo, which clips from above only")
        if any(share != 1 for share, _ in self.schedule.stages):
            raise ValueError(f"schedule.stages={self.schedule.stages} must keep the batch size: answers come "
                             "in groups")  # fmt: skip
        if self.batch_rows % self.samples:
            raise ValueError(
                f"batch_rows={self.batch_rows} must be a multiple of samples={self.samples}, the answers to "
                "each question"
            )
        if not self.data:
            raise ValueError("no --data; name what to ask, such as names")
        return self

"""What configures `hotlap eval`. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hotlap.common.checks import at_least


@dataclass(frozen=True)
class EvalConfig:
    """Score a model: bits per byte, CORE, samples, and held-out questions of the built-in tasks."""

    model_field: ClassVar[str] = "model"
    model: Path = Path("runs/tiny/sft")
    """Run or model directory."""
    tasks: tuple[str, ...] = ("facts", "arithmetic", "spelling", "refusals")
    """What to score: bpb, core and samples; facts, arithmetic, spelling and refusals only for chat models."""
    data: str | None = None
    """For bpb: text, as for pretraining, or a folder of shards, of which the validation split is read."""
    validation_tokens: int = 0
    """For bpb: tokens to read, from the start of the split; 0 means all."""
    core_bundle: Path | None = None
    """For core: nanochat's eval_bundle folder; downloaded if not given."""
    max_per_task: int = 0
    """For core: examples per task (nanochat uses 500 during training); 0 means all."""
    out: Path | None = None
    """JSON file for scores, samples and wrong answers; it must not exist yet."""

    def validate(self) -> EvalConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "validation_tokens", "max_per_task", zero="all")
        return self

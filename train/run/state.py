"""What a run has come to, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunState:
    """What a run keeps from process to process, as state.json of a checkpoint holds it."""

    stage: str = ""
    """pretrain, sft, ..."""
    data: str = ""
    """Identity of what is trained on."""
    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """Of training; start-up, compilation, validation and saving are not counted."""
    tokens: int = 0
    skipped: int = 0
    """Steps that were left out."""
    recent: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "norm": []})
    """Losses and gradient norms of the last steps, by which a jump is seen."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    finished: bool = False

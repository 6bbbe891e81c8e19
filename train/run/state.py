"""The state of a run besides its weights and the optimiser's state."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunState:
    """What a checkpoint keeps in state.json."""

    stage: str = ""
    """pretrain, sft, ..."""
    data: str = ""
    """Fingerprint of the training data."""
    step: int = 0
    """Completed steps."""
    seconds: float = 0.0
    """Of training, without start-up, compilation, validation and saving."""
    tokens: int = 0
    skipped: int = 0
    """Steps skipped as bad."""
    recent: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "norm": []})
    """Losses and gradient norms of the last steps, for detecting spikes."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    finished: bool = False
    carried: dict = field(default_factory=dict)
    """What the next steps need of earlier ones, if a resumed run could not make it again: the stage's
    iterator of batches fills it, in place."""

    def advance(self, tokens: int, seconds: float, skipped: bool, finished: bool) -> None:
        """Count one more step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.skipped += skipped
        self.finished = finished

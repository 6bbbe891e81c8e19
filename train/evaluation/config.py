"""What configures `hotlap eval` and `hotlap lm-eval`. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hotlap.common.checks import at_least

BUILT_IN = ("facts", "arithmetic", "spelling", "refusals")
HUMANEVAL = "humaneval"  # needs a sandbox
PUBLIC = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", HUMANEVAL)
CHAT = (*PUBLIC, *BUILT_IN)
ANY_MODEL = ("bpb", "core", "samples")
WAIT = 1800  # seconds that ranks wait for one that is slower with its share of a task
SUITES = {"tasks": BUILT_IN, "chat": CHAT}


@dataclass(frozen=True)
class EvalConfig:
    """Score a model: bits per byte, CORE, samples, ChatCORE, and held-out questions of the built-in tasks."""

    model_field: ClassVar[str] = "model"
    model: Path = Path("runs/tiny/sft")
    """Run or model directory."""
    tasks: tuple[str, ...] | None = None
    """What to score, instead of a suite: bpb, core and samples; and for chat models arc-easy, arc-challenge,
    mmlu, gsm8k, humaneval, facts, arithmetic, spelling and refusals."""
    suite: Literal["tasks", "chat"] = "tasks"
    """The built-in tasks (facts, arithmetic, spelling, refusals), or all that are for chat models, with
    ChatCORE; public questions are downloaded. humaneval runs what the model writes, and is left out where no
    sandbox works."""
    data: str | None = None
    """For bpb: text, as for pretraining, or a folder of shards, of which the validation split is read."""
    validation_tokens: int = 0
    """For bpb: tokens to read, from the start of the split; 0 means all."""
    core_bundle: Path | None = None
    """For core: nanochat's eval_bundle folder; downloaded if not given."""
    max_per_task: int = 0
    """For core and questions: examples per task (nanochat uses 500 for core during training); 0 means all."""
    out: Path | None = None
    """JSON file for scores, samples and wrong answers; it must not exist yet."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tasks by name."""
        return SUITES[self.suite] if self.tasks is None else self.tasks

    def validate(self) -> EvalConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "validation_tokens", "max_per_task", zero="all")
        if self.tasks is not None and self.suite != "tasks":
            raise ValueError(f"--suite {self.suite} is a list of tasks itself; give --suite or --tasks")
        return self


@dataclass(frozen=True)
class LmEvalConfig:
    """Score a model on tasks of lm-eval, or on one's own in its format."""

    model_field: ClassVar[str] = "model"
    model: Path = Path("runs/tiny/sft")
    """Run or model directory."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags."""
    include_path: Path | None = None
    """Folder with further tasks, in lm-eval's YAML."""
    chat: bool = False
    """Ask in conversations, as chat models are trained on, instead of plain text."""
    num_fewshot: int | None = None
    """Solved examples before each question; the task's own number if not given."""
    limit: int = 0
    """Examples per task; 0 means all."""
    out: Path | None = None
    """JSON file for scores and every answer; it must not exist yet."""

    def validate(self) -> LmEvalConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "limit", zero="all")
        if self.num_fewshot is not None:
            at_least(self, 0, "num_fewshot")
        return self


def check_out(out: Path | None) -> None:
    """Raise FileExistsError or FileNotFoundError if --out cannot be written."""
    if out and out.exists():
        raise FileExistsError(f"{out} exists; choose another file with --out")
    if out and not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} for {out.name}; create it first")

"""What configures the speedruns. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from hotlap.common.checks import between, positive
from hotlap.train.config import Dtype
from hotlap.train.data.mixtures import parts_of
from hotlap.train.presets import PAIRS, PROMPTS, TALKS, check_depth

MOST_RUNS = 1000
MOST_TIMED_RUNS = 30


@dataclass(frozen=True)
class TinyConfig:
    """Train a model that answers questions about Python, in minutes, without a GPU or a download."""

    out: Path = Path("runs/tiny")
    """Folder for everything this command writes."""


@dataclass(frozen=True)
class MinutesConfig:
    """Train the best model this device can in a fixed time, by karpathy/autoresearch's protocol."""

    out: Path = Path("runs/minutes")
    """Folder for the run."""
    minutes: float = 5.0
    """Minutes of training, without start-up, compilation and validation; a record has 5."""
    runs: int = 1
    """Number of runs, each with its own seed; a row of the table of records has at least 3."""
    data: str = "climbmix"
    """climbmix, pydocs, docs, shakespeare, bigbench, text or .jsonl files, or a folder of token shards."""
    dtype: Dtype = "auto"
    """Compute dtype."""
    yes: bool = False
    """Start without asking for confirmation."""

    def validate(self) -> MinutesConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        positive(self, "minutes")
        between(self, 1, MOST_TIMED_RUNS, "runs")
        return self


@dataclass(frozen=True)
class VerifyConfig:
    """Check a record of `hotlap speedrun minutes`: docs/records.md says what it shows, and what it cannot."""

    record: tyro.conf.Positional[Path] = Path("runs/minutes/record.json")
    """record.json."""
    checkpoint: Path | None = None
    """Folder of its run or runs, or of one model; what is beside the record if not given."""

    def validate(self) -> VerifyConfig:
        """Return self: there is no number to check."""
        return self


@dataclass(frozen=True)
class TrackConfig:
    """modded-nanogpt's main track: train 124M parameters to a loss of 3.28 on FineWeb."""

    out: Path = Path("runs/gpt2-124m")
    """Folder for the runs and their report."""
    data: Path = Path("data/fineweb")
    """Folder of FineWeb token shards; missing ones are downloaded."""
    runs: int = 1
    """Number of runs, each with its own seed; the rules ask for a mean loss below 3.28 with p < 0.01."""
    micro_batch: str = "auto"
    """Rows per forward pass on each rank: a number, all, or auto (as many as fit in memory)."""
    dtype: Dtype = "auto"
    """Compute dtype."""
    yes: bool = False
    """Start without asking for confirmation."""

    def validate(self) -> TrackConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        between(self, 1, MOST_RUNS, "runs")
        return self


@dataclass(frozen=True)
class GradeConfig:
    """nanochat's speedrun: train a model that beats GPT-2 on CORE (0.256525), then a chat model."""

    out: Path = Path("runs/gpt2-grade")
    """Folder for everything this command writes."""
    depth: int = 24
    """Number of layers; everything else follows from it."""
    data: Path = Path("data/climbmix")
    """Folder of ClimbMix token shards and their tokenizer; missing ones are downloaded and tokenized."""
    talks: tuple[str, ...] = TALKS
    """What to fine-tune on: a mixture, as --data of `hotlap sft` takes it. What is missing is downloaded."""
    finish: Literal["sft", "dpo", "rl"] = "sft"
    """The last stage. sft: fine-tuning. After it, dpo: preference training; or rl: reinforcement learning."""
    pairs: tuple[str, ...] = PAIRS
    """For dpo: pairs of answers, as --data of `hotlap dpo` takes them. What is missing is downloaded."""
    prompts: tuple[str, ...] = PROMPTS
    """For rl: questions, as --data of `hotlap rl` takes them, but no files. Missing ones are downloaded."""
    core_bundle: Path | None = None
    """nanochat's eval_bundle folder; downloaded by default."""
    micro_batch: str = "auto"
    """Rows per forward pass on each rank: a number, all, or auto (as many as fit in memory)."""
    fp8: bool = False
    """Run large matmuls in fp8."""
    yes: bool = False
    """Start without asking for confirmation."""

    def validate(self) -> GradeConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        check_depth(self.depth)
        parts_of(self.talks)
        for name, stage, default in (("pairs", "dpo", PAIRS), ("prompts", "rl", PROMPTS)):
            found = getattr(self, name)
            if not found:
                raise ValueError(f"no --{name}; leave it out for {' '.join(default)}")
            if found != default and self.finish != stage:
                raise ValueError(f"--{name} {' '.join(found)} is for --finish {stage}; add it")
        return self


@dataclass(frozen=True)
class ReportCardConfig:
    """Write the scores after each stage that made a run's model, beside nanochat's, into the run's folder."""

    model_field: ClassVar[str] = "run"
    run: Path = Path("runs/tiny/sft")
    """Run directory. The stages before it are found through its configuration."""

"""What configures the studies. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from hotlap.common.checks import at_least, positive
from hotlap.train.presets import check_depth

FEWEST = 3  # runs needed to fit A and b, and to see how well they fit
MOST_FLOPS = 1e40  # that are looked at for a depth


@dataclass(frozen=True)
class SweepConfig:
    """Train variants of a recipe at equal tokens or equal time, and compare them with the recipe.

    --fill-table: search for what `hotlap speedrun minutes` trains best on this device in --seconds.
    """

    variants: tuple[str, ...] = ()
    """Each is a string of TOML assignments: "model.smear=false optim.matrix_lr=0.01"."""
    preset: str = "tiny"
    """The recipe: a preset of `hotlap pretrain`."""
    base: str = ""
    """Assignments for the recipe and all variants: 'data="text.txt" loop.steps=100'."""
    seconds: float = 0
    """Training time of each run, turned into steps by timing each variant first; 0: equal tokens."""
    seeds: int = 3
    """Runs of each variant."""
    out: Path = Path("runs/sweep")
    """Folder for the runs and the table: sweep.json, sweep.md and sweep.png; with --fill-table, shapes.json
    and shapes.md."""
    fill_table: bool = False
    """Search for the best depth, batch, context and vocabulary, and add them to the table from which `hotlap
    speedrun minutes` chooses."""
    data: str = "pydocs"
    """For --fill-table: the text or the folder of token shards, as in `hotlap speedrun minutes`."""
    yes: bool = False
    """For --fill-table: start without asking for confirmation."""

    def validate(self) -> SweepConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "seconds", zero="equal tokens")
        at_least(self, 1, "seeds")
        if not self.fill_table:
            if self.data != "pydocs" or self.yes:
                raise ValueError(
                    "--data and --yes are for --fill-table; without it, data is part of the recipe: "
                    "--base 'data=\"text.txt\"'"
                )
            return self
        if self.variants or self.base or self.preset != "tiny":
            raise ValueError("--fill-table has variants and a recipe of its own; leave out the others")
        if not self.seconds:
            raise ValueError("--fill-table needs --seconds, such as 300 for `hotlap speedrun minutes`")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds} must be at least 2 for --fill-table, to see the noise")
        return self


@dataclass(frozen=True)
class CompareConfig:
    """Train a recipe and changes of it over a ladder of sizes: how much less compute do they need?

    A and B are strings of TOML assignments, such as "optim.matrix_lr=0.01 model.smear=false"; "" is the
    preset itself. Each is a recipe at the preset's depth, and is carried to the others by nanochat's rules.
    Finished runs are kept: rerun with more depths, seeds or changes to extend the series.
    """

    a: tyro.conf.Positional[str] = ""
    """The recipe to compare with."""
    b: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or more recipes, each compared with A."""
    preset: str = "tiny"
    """The recipe that A and B change: a preset of `hotlap pretrain`."""
    base: str = ""
    """Assignments for A and B: 'data="bigbench" model.context=128'."""
    depths: tuple[int, ...] = (2, 3, 4, 5)
    """Numbers of layers, at least three."""
    ratio: float = 0
    """Training tokens per matmul parameter; 0: as many as the preset."""
    seeds: int = 2
    """Runs of each recipe at each depth."""
    out: Path = Path("runs/compare")
    """Folder for the runs and the results: compare.json, compare.md and compare.png."""

    def validate(self) -> CompareConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        check_depths(self.depths)
        at_least(self, 0, "ratio", zero="the preset's")
        at_least(self, 1, "seeds")
        return self


@dataclass(frozen=True)
class ScalingConfig:
    """Train several depths, each compute-optimally, and fit scaling laws to their losses.

    Finished runs are kept: rerun with more depths or budgets to extend the series.
    """

    depths: tuple[int, ...] = (12, 14, 16, 18, 20)
    """Numbers of layers, at least three."""
    ratio: float = 12
    """Training tokens per matmul parameter."""
    vocab_size: int = 32768
    """Vocabulary size of the tokenizer."""
    context: int = 2048
    """Length of a row in tokens."""
    data: str = "pydocs"
    """See `hotlap pretrain --help`."""
    tokenizer: str = "bpe"
    """See `hotlap pretrain --help`."""
    micro_batch: str = "auto"
    """Rows per forward pass on each rank: a number, all, or auto (as many as fit in memory)."""
    seed: int = 0
    """Seed of every run."""
    out: Path = Path("runs/scaling")
    """Folder for the runs (d12, ...) and the results: scaling.json, scaling.md and scaling.png."""
    budget_flops: float = 0
    """Predict the depth to train for this many FLOPs."""
    budget_hours: float = 0
    """Predict the depth to train in this many hours on this machine."""
    budget_dollars: float = 0
    """Predict the depth to train for this many dollars."""
    dollars_per_hour: float = 0
    """Hourly price of this machine; 0: a published price, if there is one for its GPUs."""

    def validate(self) -> ScalingConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        check_depths(self.depths)
        positive(self, "ratio")
        at_least(self, 1, "vocab_size", "context")
        at_least(self, 0, "seed")
        at_least(self, 0, "budget_hours", "budget_dollars", "dollars_per_hour", zero="none")
        if not 0 <= self.budget_flops < MOST_FLOPS:
            raise ValueError(
                f"budget_flops={self.budget_flops} must be 0 (none) or more, up to {MOST_FLOPS:g}"
            )
        return self


@dataclass(frozen=True)
class AblationsConfig:
    """Train the demo's base model without each part of its recipe, at equal time and on several seeds."""

    seconds: float = 20
    """Training time of each run."""
    seeds: int = 3
    """Runs of each variant."""
    only: tuple[str, ...] = ()
    """Names of the variants to train; all by default."""
    base: str = ""
    """Assignments for all runs: "loop.clip=1.0 model.layers=2"."""
    out: Path = Path("runs/ablations")
    """Folder for the runs and the table: sweep.json, sweep.md and sweep.png."""

    def validate(self) -> AblationsConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "seconds", zero="equal tokens")
        at_least(self, 1, "seeds")
        return self


def check_depths(depths: tuple[int, ...]) -> None:
    """ValueError if a law cannot be fitted to models of these depths."""
    if len(set(depths)) != len(depths) or len(depths) < FEWEST:
        raise ValueError(
            f"depths={list(depths)} must be at least {FEWEST} different depths: a law fits any two"
        )
    for depth in depths:
        check_depth(depth)

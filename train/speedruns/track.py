"""modded-nanogpt's main track: 124M parameters to a loss of 3.28 on FineWeb, over several seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from hotlap.common import options
from hotlap.common.checks import between
from hotlap.train.data import public
from hotlap.train.distributed.sharding import Dtype
from hotlap.train.distributed.world import joined
from hotlap.train.presets import gpt2_124m
from hotlap.train.pretrain import pretrain
from hotlap.train.speedruns.plan import confirm, download_words, plan
from hotlap.train.speedruns.records import GPT2_124M, of_recipe
from hotlap.train.speedruns.result import write_result

SHARD_TOKENS = 100_000_000  # of FineWeb
TRACK_LOSS = 3.28
TRACK_P = 0.01


MOST_RUNS = 1000


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


def track_speedrun(config: TrackConfig) -> dict:
    """Train all runs. Returns the result, or {} if the user declines the plan. All ranks call it.

    The track's rules: FineWeb's tokens in their given order; the loss on the first 10,485,760 validation
    tokens; compiling and warming up is not timed if the state is restored afterwards; nor is validation.
    """
    config.validate()
    test = one_sided_test() if config.runs > 1 else None
    recipe = dataclasses.replace(
        gpt2_124m(), data=str(config.data), micro_batch=config.micro_batch, dtype=config.dtype, resume="auto"
    ).validate()
    with joined() as world:
        shards = math.ceil(recipe.tokens / SHARD_TOKENS)
        download = download_words("fineweb", config.data, shards, world)
        title = f"GPT-2 (124M) to a loss of {TRACK_LOSS} on FineWeb"
        if not confirm(title, plan(recipe, world, download, config.runs), config.yes, world):
            return {}
        with world.main_first("fineweb"):
            if world.is_main:
                public.fineweb(config.data, shards)
        folders = [config.out / f"run-{seed}" for seed in range(config.runs)]
        runs = [
            pretrain(dataclasses.replace(recipe, out=folder, seed=seed), warm_up=True)
            for seed, folder in enumerate(folders)
        ]
        result = track_result(runs, test)
        if world.is_main:
            write_result(config.out, title, result, folders, of_recipe(GPT2_124M), "validation_loss")
    return result


def one_sided_test():
    try:
        from scipy.stats import ttest_1samp
    except ImportError as error:
        raise ImportError("the p-value needs scipy: pip install 'hotlap[stats]'") from error
    return ttest_1samp


def track_result(runs: list[dict[str, float]], test) -> dict:
    """Means over runs, and the p-value of a one-sided t-test that the mean loss is below 3.28."""
    losses = [run["validation_loss"] for run in runs]
    p = float(test(losses, TRACK_LOSS, alternative="less").pvalue) if len(runs) > 1 else None
    return {
        "runs": len(runs),
        "losses": losses,
        "mean": statistics.fmean(losses),
        "sigma": statistics.stdev(losses) if len(runs) > 1 else None,
        "p": p,
        "reached": p is not None and p < TRACK_P,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "tokens": runs[0]["tokens"],
    }


def main(arguments: list[str]) -> None:
    """`hotlap speedrun gpt2-124m`."""
    track_speedrun(options.parse(TrackConfig, arguments, command="speedrun gpt2-124m"))

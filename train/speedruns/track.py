"""modded-nanogpt's main track: 124M parameters to a loss of 3.28 on FineWeb, over several seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics

from hotlap.train.data import public
from hotlap.train.distributed.world import joined
from hotlap.train.presets import gpt2_124m
from hotlap.train.pretrain import pretrain
from hotlap.train.speedruns.config import TrackConfig
from hotlap.train.speedruns.plan import confirm, download_words, plan
from hotlap.train.speedruns.records import GPT2_124M, of_recipe
from hotlap.train.speedruns.result import write_result

SHARD_TOKENS = 100_000_000  # of FineWeb
TRACK_LOSS = 3.28
TRACK_P = 0.01


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


def main(config: TrackConfig) -> None:
    """`hotlap speedrun gpt2-124m`."""
    track_speedrun(config)

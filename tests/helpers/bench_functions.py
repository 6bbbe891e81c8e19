"""Benchmarks on several ranks, for tests."""

from pathlib import Path

from helpers.tools import tiny_config

from hotlap.bench import training


def train_together(folder: str) -> list[dict]:
    """Training steps of a tiny model, 4 rows on each rank."""
    training.model_config = lambda name: tiny_config()
    return training.bench_training(training.TrainingConfig(("tiny",), rows=4, steps=2, out=Path(folder)))

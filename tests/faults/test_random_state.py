"""Resuming restores the random state."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from helpers.checkpoints import draw, draw_on, draws, state_in
from helpers.ranks import in_world, run_ranks
from helpers.small_runs import small_run

from hotlap.train import pretrain
from hotlap.train.run.metrics import read_metrics
from hotlap.train.run.random_state import random_state


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_a_resumed_run_with_dropout_draws_the_same_numbers(tmp_path, monkeypatch):
    real = pretrain.next_token_loss

    def train(config, until: int = 12) -> None:
        steps = itertools.count()

        def loss_with_dropout(model, batch):
            if next(steps) == until:
                raise KeyboardInterrupt
            return real(model, batch)[0] * (1 + sum(draws()) / 10), {}

        monkeypatch.setattr(pretrain, "next_token_loss", loss_with_dropout)
        pretrain.pretrain(config)

    seed_everything(1)
    train(straight := small_run(tmp_path, out=tmp_path / "straight"))
    end = random_state()
    seed_everything(1)
    stopped = small_run(tmp_path, out=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, until=7)
    seed_everything(2)  # a new process starts from another state
    train(dataclasses.replace(stopped, resume="auto"))
    assert random_state() == end
    straight_losses, losses = (
        [float.hex(m["loss"]) for m in read_metrics(run / "metrics.jsonl")]
        for run in (straight.out, stopped.out)
    )
    assert losses == straight_losses and len(losses) == 12
    assert state_in(straight.out) == state_in(stopped.out)


def test_each_rank_restores_its_random_state_unless_the_number_of_ranks_changes(tmp_path):
    drawn = run_ranks(2, in_world, draw_on, tmp_path)
    assert drawn[0] != drawn[1]
    assert run_ranks(2, in_world, draw, tmp_path) == drawn
    assert run_ranks(1, in_world, draw, tmp_path)[0] not in drawn

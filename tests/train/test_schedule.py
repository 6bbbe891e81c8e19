"""Learning rate, momentum and weight decay over a run."""

import itertools

import numpy as np
import pytest
from tools import tiny_config

from hotlap.model.gpt import GPT
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.schedule import ScheduleConfig, decay_share, lr_share, momentum_at, set_schedule

STEPS = 1000
CONFIG = ScheduleConfig(
    warmup_steps=40, warmdown=0.65, final_lr=0.05, momentum=(0.85, 0.97, 0.90), momentum_warmup_steps=300
)


def over_the_run(function) -> np.ndarray:
    return np.array([function(step) for step in range(STEPS + 1)])


def test_the_learning_rate_rises_stays_and_falls():
    share = over_the_run(lambda step: lr_share(CONFIG, step, STEPS))
    assert share[0] == pytest.approx(1 / 40) and share[39] == 1 and share[350] == 1
    assert share[STEPS] == pytest.approx(0.05) and share[675] == pytest.approx((1 + 0.05) / 2)
    assert (np.diff(share[:40]) > 0).all() and (share[39:351] == 1).all() and (np.diff(share[350:]) < 0).all()
    assert np.allclose(np.diff(share[350:], 2), 0)


def test_without_warmup_and_warmdown_the_learning_rate_stays():
    flat = ScheduleConfig(warmup_steps=0, warmdown=0.0)
    assert {lr_share(flat, step, 10) for step in range(10)} == {1.0}


def test_momentum_rises_and_falls_without_a_jump():
    momentum = over_the_run(lambda step: momentum_at(CONFIG, step, STEPS))
    assert momentum[0] == pytest.approx(0.85) and momentum[300] == pytest.approx(0.97)
    assert momentum[350] == pytest.approx(0.97) and momentum[STEPS] == pytest.approx(0.90)
    assert (np.diff(momentum[:301]) > 0).all() and (np.diff(momentum[350:]) < 0).all()
    assert np.abs(np.diff(momentum)).max() < 0.12 / 300 + 1e-9


def test_momentum_has_no_jump_where_the_rise_reaches_into_the_fall():
    short = [momentum_at(ScheduleConfig(), step, 300) for step in range(301)]
    assert max(abs(b - a) for a, b in itertools.pairwise(short)) < 0.12 / 195 + 1e-9


def test_weight_decay_is_half_a_cosine():
    decay = over_the_run(lambda step: decay_share(step, STEPS))
    assert decay[0] == 1 and decay[500] == pytest.approx(0.5) and decay[STEPS] == pytest.approx(0, abs=1e-12)
    assert (np.diff(decay) < 0).all()


def test_setting_a_step_twice_is_setting_it_once():
    optimizer = MuonAdamW(GPT(tiny_config()).init_weights(), OptimConfig(weight_decay=0.5))
    read = lambda: [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] + [optimizer.momentum]  # noqa: E731
    for step in (100, 700, 100):
        share = set_schedule(optimizer, CONFIG, step, STEPS)
        first = read()
        set_schedule(optimizer, CONFIG, step, STEPS)
        assert read() == first and share == lr_share(CONFIG, step, STEPS)
    for group in optimizer.param_groups:
        assert group["lr"] == group["peak_lr"] * lr_share(CONFIG, 100, STEPS)
        decays = decay_share(100, STEPS) if group["muon"] else 1
        assert group["weight_decay"] == group["peak_weight_decay"] * decays


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"warmdown": 1.5}, 10),
        ({"warmdown": float("nan")}, 10),
        ({"final_lr": -0.1}, 10),
        ({"warmup_steps": -1}, 10),
        ({"momentum_warmup_steps": 0}, 10),
        ({"momentum": (0.9, 1.0, 0.9)}, 10),
        ({"momentum": (0.9, float("nan"), 0.9)}, 10),
        ({}, 0),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, steps):
    with pytest.raises(ValueError, match="must be"):
        ScheduleConfig(**fields).validate(steps)

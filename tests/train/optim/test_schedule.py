"""Schedules of learning rate, momentum, weight decay, batch size and windows."""

import itertools

import numpy as np
import pytest
from helpers.tools import tiny_config

from hotlap.model.gpt import GPT
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import (
    ScheduleConfig,
    decay_share,
    lr_share,
    momentum_at,
    rows_in_all,
    set_schedule,
    stage_at,
    stage_rows,
)

STEPS = 1000
CONFIG = ScheduleConfig(
    warmup_steps=40, warmdown=0.65, final_lr=0.05, momentum=(0.85, 0.97, 0.90), momentum_warmup_steps=300
)


def over_the_run(function) -> np.ndarray:
    return np.array([function(step) for step in range(STEPS + 1)])


def test_the_learning_rate_rises_stays_and_falls():
    share = over_the_run(lambda step: lr_share(CONFIG, step, step / STEPS))
    assert share[0] == pytest.approx(1 / 40) and share[39] == 1 and share[350] == 1
    assert share[STEPS] == pytest.approx(0.05) and share[675] == pytest.approx((1 + 0.05) / 2)
    assert (np.diff(share[:40]) > 0).all() and (share[39:351] == 1).all() and (np.diff(share[350:]) < 0).all()
    assert np.allclose(np.diff(share[350:], 2), 0)


def test_without_warmup_and_warmdown_the_learning_rate_stays():
    flat = ScheduleConfig(warmup_steps=0, warmdown=0.0)
    assert {lr_share(flat, step, step / 10) for step in range(10)} == {1.0}


def test_momentum_rises_and_falls_without_a_jump():
    momentum = over_the_run(lambda step: momentum_at(CONFIG, step, step / STEPS))
    assert momentum[0] == pytest.approx(0.85) and momentum[300] == pytest.approx(0.97)
    assert momentum[350] == pytest.approx(0.97) and momentum[STEPS] == pytest.approx(0.90)
    assert (np.diff(momentum[:301]) > 0).all() and (np.diff(momentum[350:]) < 0).all()
    assert np.abs(np.diff(momentum)).max() < 0.12 / 300 + 1e-9


def test_momentum_has_no_jump_when_warmup_and_warmdown_overlap():
    short = [momentum_at(ScheduleConfig(), step, step / 300) for step in range(301)]
    assert max(abs(b - a) for a, b in itertools.pairwise(short)) < 0.12 / 195 + 1e-9


def test_weight_decay_is_half_a_cosine():
    decay = over_the_run(lambda step: decay_share(step / STEPS))
    assert decay[0] == 1 and decay[500] == pytest.approx(0.5) and decay[STEPS] == pytest.approx(0, abs=1e-12)
    assert (np.diff(decay) < 0).all()


def test_set_schedule_is_idempotent():
    model = GPT(tiny_config()).init_weights()
    optimizer = MuonAdamW(model, OptimConfig(weight_decay=0.5))
    read = lambda: [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] + [optimizer.momentum]  # noqa: E731
    for step in (100, 700, 100):
        share = set_schedule(model, optimizer, CONFIG, step, step / STEPS)
        first = read()
        set_schedule(model, optimizer, CONFIG, step, step / STEPS)
        assert read() == first and share == lr_share(CONFIG, step, step / STEPS)
    for group in optimizer.param_groups:
        assert group["lr"] == group["peak_lr"] * lr_share(CONFIG, 100, 0.1)
        decays = decay_share(0.1) if group["muon"] else 1
        assert group["weight_decay"] == group["peak_weight_decay"] * decays


@pytest.mark.parametrize(
    "fields",
    [
        {"warmdown": 1.5},
        {"warmdown": float("nan")},
        {"final_lr": -0.1},
        {"warmup_steps": -1},
        {"momentum_warmup_steps": 0},
        {"momentum": (0.9, 1.0, 0.9)},
        {"momentum": (0.9, float("nan"), 0.9)},
        {"stages": ()},
        {"stages": ((0.5, 1.0), (1.0, 0.5))},
        {"stages": ((0.0, 1.0), (1.0, 1.0))},
    ],
)
def test_invalid_schedules_are_refused(fields):
    with pytest.raises(ValueError, match="must"):
        ScheduleConfig(**fields).validate()


STAGES = ScheduleConfig(warmup_steps=0, stages=((0.25, 0.25), (0.5, 0.5), (1.0, 1.0)))


def test_stages_are_equal_parts_of_a_run():
    assert [stage_at(STAGES, step / 9) for step in range(9)] == [s for s in STAGES.stages for _ in range(3)]
    assert stage_rows(STAGES, 16) == [4, 8, 16]
    assert rows_in_all(STAGES, 16, 9) == 3 * (4 + 8 + 16)
    assert lr_share(STAGES, 0, 0.0) == 0.5 * lr_share(STAGES, 8, 0.0 + 1 / 3) / 0.5**0.5
    with pytest.raises(ValueError, match="must be whole"):
        stage_rows(STAGES, 6)


def test_windows_grow_with_the_stages_to_full_size():
    model = GPT(tiny_config(layers=3, context=1024, window_pattern="SL"))
    optimizer = MuonAdamW(model.init_weights(), OptimConfig())
    seen = []
    for step in range(3):
        set_schedule(model, optimizer, STAGES, step, step / 3)
        seen.append(tuple(block.attention.window for block in model.blocks))
    assert model.config.windows == (256, 1024, 1024)
    assert seen == [(128, 256, 256), (128, 512, 512), (256, 1024, 1024)]


@pytest.mark.parametrize("context", [1, 16, 127, 128, 129, 300])
@pytest.mark.parametrize("share", [1e-9, 0.001, 0.01, 1 / 3, 0.999, 1.0])
def test_a_share_of_a_window_is_at_least_one_step_of_128_keys_and_at_most_the_window(context, share):
    model = GPT(tiny_config(layers=2, context=context, window_pattern="SL"))
    model.set_windows(share)
    for block, whole in zip(model.blocks, model.config.windows, strict=True):
        assert min(128, whole) <= block.attention.window <= whole


def test_a_stage_begins_at_its_part_of_the_run_however_the_division_is_rounded():
    for parts in range(1, 60):
        config = ScheduleConfig(stages=tuple((1.0, (i + 1) / parts) for i in range(parts)))
        for steps in (1, 2, parts, 2 * parts, 97):
            stages = [stage_at(config, step / steps) for step in range(steps)]
            assert stages == [config.stages[step * parts // steps] for step in range(steps)]


@pytest.mark.parametrize("share", [1e-12, 0.01, 0.24])
def test_a_share_of_the_batch_that_is_no_row_is_refused(share):
    with pytest.raises(ValueError, match="must be whole"):
        stage_rows(ScheduleConfig(stages=((share, 1.0), (1.0, 1.0))), 4)


def test_stages_of_a_timed_run_cannot_change_the_batch_size():
    with pytest.raises(ValueError, match="the same batch size"):
        STAGES.validate(minutes=1.0)
    ScheduleConfig(stages=((1.0, 0.5), (1.0, 1.0))).validate(minutes=1.0)


@pytest.mark.parametrize("steps", [1, 2, 7, 9, 100, 1001])
def test_the_rows_of_all_steps_are_counted_without_a_walk_over_them(steps):
    config = ScheduleConfig(stages=((1 / 4, 1.0), (1 / 2, 1.0), (1.0, 1.0)))
    one_by_one = sum(round(16 * stage_at(config, step / steps)[0]) for step in range(steps))
    assert rows_in_all(config, 16, steps) == one_by_one
    assert rows_in_all(ScheduleConfig(), 16, 10**18) == 16 * 10**18

"""The training loop: gradient accumulation, metrics, signals, bad steps and timed runs."""

import dataclasses
import math
import os
import shutil
import signal
import time

import pytest
import torch
from helpers.small_runs import random_shards
from helpers.tools import tiny_config

from hotlap.common.errors import Interrupted
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.gpt import GPT
from hotlap.train.data.rows import Batch, step_batches
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, lr_share
from hotlap.train.passes import Passes
from hotlap.train.run.metrics import read_metrics
from hotlap.train.run.state import RunState
from hotlap.train.step import WARMUP_STEPS, Outcome, take_step
from hotlap.train.step_checks import MAX_SKIPPED, MIN_HISTORY, StepChecker

SCHEDULE = ScheduleConfig(warmup_steps=2)
CONFIG = tiny_config(layers=1, context=16)


@pytest.fixture
def world():
    with joined() as world:
        yield world


def fresh() -> tuple[GPT, MuonAdamW]:
    model = GPT(CONFIG).init_weights()
    return model, MuonAdamW(model, OptimConfig())


def ragged_batch() -> Batch:
    """8 rows of packed documents. Some rows have few targets, one has none."""
    batch = random_shards([[5, 9, 30, 1, 1, 14, 20, 30, 40]], 16).batch(0, 8)
    batch.targets[1, 3:] = IGNORE
    batch.targets[2] = IGNORE
    batch.targets[5, ::3] = IGNORE
    return weighed(batch)


def weighed(batch: Batch) -> Batch:
    return dataclasses.replace(batch, weight=int((batch.targets != IGNORE).sum()))


def split(batch: Batch, rows: int) -> list[Batch]:
    return [weighed(batch.change(lambda t, i=i: t[i : i + rows])) for i in range(0, 8, rows)]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(rows, random_model, world):
    results = []
    for micro in (split(ragged_batch(), 8), split(ragged_batch(), rows)):
        model = random_model(CONFIG)
        weight = sum(b.weight for b in micro)
        outcome = take_step(Passes(model, next_token_loss), micro, weight, 0.0, world)
        results.append(
            (outcome.loss, outcome.norm, torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
    (loss, norm, gradient), (same_loss, same_norm, same_gradient) = results
    assert same_loss == pytest.approx(loss, rel=1e-5) and same_norm == pytest.approx(norm, rel=1e-5)
    assert (gradient - same_gradient).norm() < 1e-5 * gradient.norm()
    model = random_model(CONFIG)
    batch = ragged_batch()
    mean = model(batch.inputs, batch.targets, reduction="mean", document_start=batch.document_start)
    assert loss == pytest.approx(mean.item(), rel=1e-5)


def test_a_step_without_targets_is_an_error(world):
    batch = ragged_batch()
    batch.targets[:] = IGNORE
    with pytest.raises(ValueError, match="no targets"):
        take_step(Passes(fresh()[0], next_token_loss), [batch], 0, 0.0, world)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_bounds_the_norm_and_reports_the_unclipped_one(clip, random_model, world):
    model = random_model(CONFIG)
    batch, passes = ragged_batch(), Passes(model, next_token_loss)
    norm = take_step(passes, [batch], batch.weight, clip, world).norm
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norm > 0.01 and clipped == pytest.approx(min(norm, clip), rel=1e-4)


def run_fit(tmp_path, tokenizer, loss_fn=next_token_loss, batches=None, steps=8, **arguments):
    model, optimizer = fresh()
    (tmp_path / "run").mkdir(exist_ok=True)
    rows = random_shards([[5, 9, 30, 1, 1, 14, 20, 30, 40]], 16)
    config = LoopConfig(steps, **{"evaluate_every": 4, "save_every": 4} | arguments.pop("loop", {}))
    arguments.setdefault("run", tmp_path / "run")
    batches = batches or step_batches(rows, batch_rows=4, micro_rows=2)
    with joined() as world:
        last = fit(config, SCHEDULE, model, optimizer, tokenizer, batches, loss_fn, world=world, **arguments)
    return model, last


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_nan_or_infinite_value_stops_the_run_before_the_update(tmp_path, tiny_tokenizer, spoilt):
    weights = []

    def loss_fn(model, batch):
        weights.append([p.detach().clone() for p in model.parameters()])
        models.append(model)
        loss, metrics = next_token_loss(model, batch)
        if len(weights) == 5:  # the first micro-batch of step 2
            if spoilt == "loss":
                return loss * float("nan"), metrics
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, metrics

    models = []
    with pytest.raises(FloatingPointError, match="at step 2"):
        run_fit(tmp_path, tiny_tokenizer, loss_fn)
    assert len(weights) == 6
    assert all(torch.equal(a, b) for a, b in zip(weights[4], models[-1].parameters(), strict=True))
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_metrics_have_one_json_line_per_step_with_null_for_unknown_values(tmp_path, tiny_tokenizer):
    _, last = run_fit(tmp_path, tiny_tokenizer, evaluate=lambda: {"validation_loss": math.inf})
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["tokens"] for line in lines] == [64 * (i + 1) for i in range(8)]
    assert [i for i, line in enumerate(lines) if "validation_loss" in line] == [3, 7]
    assert lines[7]["validation_loss"] is None and {line["mfu"] for line in lines} == {None}
    assert all(math.isfinite(line["loss"]) and line["tokens_per_second"] > 0 for line in lines)
    assert last["step"] == 7 and last["loss"] == lines[7]["loss"]


def test_further_sums_of_a_loss_are_logged_divided_by_the_weight_of_the_step(tmp_path, tiny_tokenizer):
    weights = []

    def loss_fn(model, batch):
        weights.append(batch.weight)
        return next_token_loss(model, batch)[0], {
            "targets": torch.tensor(float(batch.weight)),
            "ones": torch.ones(()),
        }

    run_fit(tmp_path, tiny_tokenizer, loss_fn)
    for i, line in enumerate(read_metrics(tmp_path / "run" / "metrics.jsonl")):  # two micro-batches a step
        assert line["targets"] == 1.0 and line["ones"] == pytest.approx(2 / sum(weights[2 * i : 2 * i + 2]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(tmp_path, tiny_tokenizer, number):
    def batches():
        rows = random_shards([[5, 9, 30, 1, 1, 14, 20, 30, 40]], 16)
        for step, micro in enumerate(step_batches(rows, batch_rows=4, micro_rows=4)):
            if step == 5:
                os.kill(os.getpid(), number)
            yield micro

    before = signal.getsignal(number)
    evaluated = []
    with pytest.raises(Interrupted, match=r"after step 6 of 8.*saved in .*--resume"):
        run_fit(tmp_path, tiny_tokenizer, batches=batches(), evaluate=lambda: evaluated.append(1) or {})
    assert (tmp_path / "run" / "checkpoints" / "step-000006" / "manifest.json").exists()
    assert signal.getsignal(number) is before and len(evaluated) == 1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5


def test_a_disk_too_small_for_a_checkpoint_is_reported_before_the_first_step(
    tmp_path, tiny_tokenizer, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    taken = []
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
        run_fit(tmp_path, tiny_tokenizer, lambda model, batch: taken.append(batch))
    assert not taken


def judged(policy: str, values: list[tuple[float, float]], random_model) -> list[bool]:
    """Whether a checker accepts each step with these losses and norms."""
    checker, model = StepChecker(policy, {"loss": [], "norm": []}), random_model(CONFIG)
    batch = ragged_batch()
    model(batch.inputs, batch.targets).backward()
    with joined() as world:
        return [
            checker.accepts(world, step, Outcome(loss, norm, {}, loss), model, [batch])
            for step, (loss, norm) in enumerate(values)
        ]


def steady(count: int) -> list[tuple[float, float]]:
    return [(3.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(count)]


@pytest.mark.parametrize("jump", [(9.0, 1.0), (3.0, 50.0)])
def test_a_spike_of_loss_or_gradient_is_logged_or_skipped(jump, random_model, caplog):
    values = [*steady(MIN_HISTORY), jump, *steady(3)]
    assert all(judged("stop", values, random_model))
    what = "loss" if jump[0] > 3 else "gradient norm"
    assert (
        f"{what} {max(jump):.4g} at step {MIN_HISTORY}" in caplog.text
        and "--loop.bad-steps skip" in caplog.text
    )
    assert judged("skip", values, random_model) == [True] * MIN_HISTORY + [False] + [True] * 3


def test_no_spike_is_reported_before_there_is_enough_history(random_model, caplog):
    assert all(judged("skip", [*steady(MIN_HISTORY - 1), (90.0, 90.0)], random_model))
    assert "standard deviations" not in caplog.text


def test_a_run_stops_after_too_many_skipped_steps_in_a_row(random_model):
    values = [(3.0, 1.0)] + [(math.nan, 1.0)] * (MAX_SKIPPED - 1)
    assert judged("skip", values, random_model) == [True] + [False] * (MAX_SKIPPED - 1)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} bad steps in a row"):
        judged("skip", [*values, (math.nan, 1.0)], random_model)


def test_the_error_for_a_bad_step_names_rank_and_batch(random_model):
    with pytest.raises(
        FloatingPointError, match=r"at step 1: rank 0 has loss nan on batch [0-9a-f]{12} \(weight \d+\)"
    ):
        judged("stop", [(3.0, 1.0), (math.nan, 1.0)], random_model)


def test_schedules_of_a_timed_run_follow_elapsed_time(tmp_path, tiny_tokenizer, monkeypatch):
    clock, evaluated = [0.0], []

    def loss_fn(model, batch):
        clock[0] += 5.0  # two micro-batches a step
        return next_token_loss(model, batch)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    _, last = run_fit(
        tmp_path,
        tiny_tokenizer,
        loss_fn,
        steps=1000,
        loop={"minutes": 1.0},
        evaluate=lambda: evaluated.append(1) or {},
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["seconds"] for line in lines] == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0] and last["step"] == 5
    expected = [lr_share(SCHEDULE, step, step / 6) for step in range(6)]
    assert [line["lr_share"] for line in lines] == pytest.approx(expected)
    assert len(evaluated) == 2 and (tmp_path / "run" / "checkpoints" / "step-000006").exists()


def test_a_finished_timed_run_takes_no_more_steps(tmp_path, tiny_tokenizer):
    batches = iter(())  # none are needed
    (tmp_path / "run").mkdir()
    _, last = run_fit(
        tmp_path, tiny_tokenizer, batches=batches, steps=1000, loop={"minutes": 1.0},
        state=RunState(step=6, finished=True, last={"step": 5, "loss": 1.0, "tokens_per_second": 1.0}),
    )  # fmt: skip
    assert last["step"] == 5


def test_a_run_of_fewer_steps_than_stages_is_validated_with_whole_windows(tmp_path, tiny_tokenizer, world):
    model = GPT(tiny_config(layers=1, context=300)).init_weights()
    optimizer = MuonAdamW(model, OptimConfig())
    schedule = ScheduleConfig(stages=((1.0, 1e-9), (1.0, 0.5), (1.0, 1.0)))
    batches = step_batches(random_shards([[5, 9, 30, 40]], 300), batch_rows=1, micro_rows=1)
    seen = []

    def loss(model, batch):
        seen.append(model.blocks[0].attention.window)
        return next_token_loss(model, batch)

    fit(
        LoopConfig(1), schedule, model, optimizer, tiny_tokenizer, batches, loss, world=world, run=tmp_path,
        evaluate=lambda: seen.append(model.blocks[0].attention.window) or {},
    )  # fmt: skip
    assert seen == [128, 300]


def test_warmup_steps_leave_no_trace(tmp_path, tiny_tokenizer):
    results = []
    for warm_up in (False, True):
        folder = tmp_path / str(warm_up)
        folder.mkdir()
        counted = []

        def loss_fn(model, batch, counted=counted):
            counted.append(model.blocks[0].attention.window)
            return next_token_loss(model, batch)

        model, last = run_fit(folder, tiny_tokenizer, loss_fn, warm_up=warm_up)
        results.append((model, last["loss"], counted))
    (model, loss, counted), (same_model, same_loss, more) = results
    assert loss == same_loss and len(more) == len(counted) + 2 * WARMUP_STEPS
    for (name, one), (_, other) in zip(model.named_parameters(), same_model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "fields",
    [
        {"minutes": -1.0},
        {"steps": 0},
        {"evaluate_every": 0},
        {"save_every": -1},
        {"clip": -1.0},
        {"clip": float("nan")},
    ],
)
def test_invalid_loop_options_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(LoopConfig(10), **fields).validate()

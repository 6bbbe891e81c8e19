"""The training loop: one update whatever the micro-batches, and what stops it."""

import dataclasses
import json
import math
import os
import shutil
import signal

import pytest
import torch
from small_runs import random_shards
from tools import tiny_config

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.errors import Interrupted
from hotlap.model.gpt import GPT
from hotlap.train.data import Batch, step_batches
from hotlap.train.loop import LoopConfig, fit, take_step
from hotlap.train.losses import next_token_loss
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.schedule import ScheduleConfig

SCHEDULE = ScheduleConfig(warmup_steps=2)
CONFIG = tiny_config(layers=1, context=16)


def fresh() -> tuple[GPT, MuonAdamW]:
    model = GPT(CONFIG).init_weights()
    return model, MuonAdamW(model, OptimConfig())


def ragged_batch() -> Batch:
    """8 rows of packed documents, of which some rows have few targets and one has none."""
    batch = random_shards([[5, 9, 30, 1, 1, 14, 20, 30, 40]], 16).batch(0, 8)
    batch.targets[1, 3:] = IGNORE
    batch.targets[2] = IGNORE
    batch.targets[5, ::3] = IGNORE
    return batch


def split(batch: Batch, rows: int) -> list[Batch]:
    parts = ([t[i : i + rows] for i in range(0, 8, rows)] for t in vars(batch).values())
    return [Batch(*tensors) for tensors in zip(*parts, strict=True)]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(rows, random_model):
    results = []
    for micro in (split(ragged_batch(), 8), split(ragged_batch(), rows)):
        model = random_model(CONFIG)
        loss, norm = take_step(model, MuonAdamW(model, OptimConfig()), micro, next_token_loss, clip=0.0)
        results.append((loss, norm, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, norm, gradient), (same_loss, same_norm, same_gradient) = results
    assert same_loss == pytest.approx(loss, rel=1e-5) and same_norm == pytest.approx(norm, rel=1e-5)
    assert (gradient - same_gradient).norm() < 1e-5 * gradient.norm()
    model = random_model(CONFIG)
    batch = ragged_batch()
    mean = model(batch.inputs, batch.targets, reduction="mean", document_start=batch.document_start)
    assert loss == pytest.approx(mean.item(), rel=1e-5)


def test_a_step_without_a_target_is_an_error():
    batch = ragged_batch()
    batch.targets[:] = IGNORE
    with pytest.raises(ValueError, match="without a single target"):
        take_step(*fresh(), [batch], next_token_loss, clip=0.0)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_bounds_the_norm_and_reports_what_it_was(clip, random_model):
    model = random_model(CONFIG)
    _, norm = take_step(model, MuonAdamW(model, OptimConfig()), [ragged_batch()], next_token_loss, clip)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert norm > 0.01 and clipped == pytest.approx(min(norm, clip), rel=1e-4)


def run_fit(tmp_path, tokenizer, loss_fn=next_token_loss, batches=None, steps=8, **arguments):
    model, optimizer = fresh()
    (tmp_path / "run").mkdir(exist_ok=True)
    rows = random_shards([[5, 9, 30, 1, 1, 14, 20, 30, 40]], 16)
    config = LoopConfig(steps, **{"evaluate_every": 4, "save_every": 4} | arguments.pop("loop", {}))
    arguments.setdefault("run", tmp_path / "run")
    batches = batches or step_batches(rows, batch_rows=4, micro_rows=2)
    last = fit(config, SCHEDULE, model, optimizer, tokenizer, batches, loss_fn, **arguments)
    return model, last


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path, tiny_tokenizer, spoilt):
    weights = []

    def loss_fn(model, batch):
        weights.append([p.detach().clone() for p in model.parameters()])
        models.append(model)
        loss = next_token_loss(model, batch)
        if len(weights) == 5:  # the first micro-batch of step 2
            if spoilt == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    models = []
    with pytest.raises(FloatingPointError, match="at step 2"):
        run_fit(tmp_path, tiny_tokenizer, loss_fn)
    assert len(weights) == 6
    assert all(torch.equal(a, b) for a, b in zip(weights[4], models[-1].parameters(), strict=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_metrics_have_a_line_of_json_for_each_step_and_null_for_what_is_unknown(tmp_path, tiny_tokenizer):
    _, last = run_fit(tmp_path, tiny_tokenizer, evaluate=lambda: {"validation_loss": math.inf})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["tokens"] for line in lines] == [64 * (i + 1) for i in range(8)]
    assert [i for i, line in enumerate(lines) if "validation_loss" in line] == [3, 7]
    assert lines[7]["validation_loss"] is None and {line["mfu"] for line in lines} == {None}
    assert all(math.isfinite(line["loss"]) and line["tokens_per_second"] > 0 for line in lines)
    assert last["step"] == 7 and last["loss"] == lines[7]["loss"]


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
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5


def test_a_disk_that_cannot_hold_a_checkpoint_shows_before_the_first_step(
    tmp_path, tiny_tokenizer, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    taken = []
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
        run_fit(tmp_path, tiny_tokenizer, lambda model, batch: taken.append(batch))
    assert not taken


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"evaluate_every": 0}, {"save_every": -1}, {"clip": -1.0}, {"clip": float("nan")}],
)
def test_a_loop_that_cannot_run_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(LoopConfig(10), **fields).validate()

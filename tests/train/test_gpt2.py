"""GPT-2 by the same loop: on any number of ranks, resumed, and starting from a model."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import USAGE, assert_error
from helpers.gpt2 import gpt2_config, random_gpt2
from helpers.ranks import run_ranks
from helpers.run_functions import fine_tuning, losses, metrics, pretraining

from hotlap.cli import main
from hotlap.model.weights import load_config, load_model, model_folder, stage
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import lr_share
from hotlap.train.presets import gpt2_classic

SHAPE = gpt2_config(context=32, layers=1, width=32, heads=1)
OPTIM = OptimConfig(adamw_lr=0.003, weight_decay=0.1)
training = partial(pretraining, model=SHAPE, optim=OPTIM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run."""
    folder = tmp_path_factory.mktemp("gpt2")
    run_ranks(1, training, str(folder), "one")
    return folder


def test_it_learns_and_any_number_of_ranks_has_the_same_losses(folder):
    run_ranks(3, training, str(folder), "three")
    alone, together = ([line["loss"] for line in metrics(folder / name)] for name in ("one", "three"))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[-1] < 0.9 * alone[0]


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(folder):
    resume = str(folder / "one/checkpoints/step-000008")
    run_ranks(1, partial(training, resume=resume), str(folder), "resumed")
    assert losses(folder / "resumed")[-2:] == losses(folder / "one")[-2:]


def test_a_run_starts_from_the_weights_shape_and_tokenizer_of_its_base(folder):
    still = dataclasses.replace(OPTIM, adamw_lr=1e-30)
    run_ranks(
        1, partial(training, base=folder / "one", optim=still, steps=1, tokenizer="bpe"), str(folder), "on"
    )
    before, after = (metrics(folder / name)[-1]["validation_loss"] for name in ("one", "on"))
    assert after == before
    assert load_config(model_folder(folder / "on")) == load_config(model_folder(folder / "one"))
    assert (folder / "on/tokenizer.json").read_text() == (folder / "one/tokenizer.json").read_text()


def test_it_is_fine_tuned_whole_and_with_adapters_and_exported(folder, capsys):
    run_ranks(1, fine_tuning, str(folder), "chat", "one")
    run_ranks(1, partial(fine_tuning, lora_rank=4, steps=2), str(folder), "lora", "chat")
    assert stage(model_folder(folder / "chat")) == "sft"
    out = folder / "merged"
    assert main(["export", "weights", str(folder / "lora"), "--out", str(out)]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged, tuned = (
            load_model(p, torch.device("cpu"), torch.float32)[0](ids) for p in (out, folder / "lora")
        )
    assert torch.equal(merged, tuned)
    capsys.readouterr()
    for kind in ("adapter", "gguf"):  # which GPT-2 is not for
        code = main(["export", kind, str(folder / "lora"), "--out", str(folder / kind)])
        assert_error(capsys, code, USAGE, "GPT-2")


def test_flags_that_a_base_decides_are_refused(folder, capsys):
    start = [
        "pretrain",
        "--data",
        str(folder / "text.txt"),
        "--out",
        str(folder / "new"),
        "--base",
        str(folder / "one"),
    ]
    for flags, text in (
        (["--model.layers", "3"], "has its own shape; leave out flags and presets with another"),
        (["--preset", "tiny"], "has its own shape"),
        (["--tokenizer", "gpt2"], "--tokenizer gpt2: the base has its own; leave it out"),
    ):
        assert_error(capsys, main([*start, *flags]), USAGE, text)


def test_the_optimizer_is_nanogpt_s():
    """Weight decay for all that has two dimensions, AdamW with one rate for everything."""
    model, twin = random_gpt2(SHAPE), random_gpt2(SHAPE)
    optimizer = MuonAdamW(model, OptimConfig(adamw_lr=6e-4, weight_decay=0.1))
    matrices = [p for p in twin.parameters() if p.dim() >= 2]
    vectors = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = theirs.grad = torch.randn_like(mine)
        optimizer.step()
        reference.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_preset_is_nanogpt_s_baseline():
    config = gpt2_classic().validate()
    assert config.batch_rows * config.model.context == 491_520
    steps, warmup = 600_000, 2000
    for step in (0, 1000, 1999, 2000, 150_000, 300_000, 599_999):
        left = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
        expected = 6e-5 + left * (6e-4 - 6e-5) if step >= warmup else 6e-4 * (step + 1) / warmup
        share = lr_share(config.schedule, step, step / config.loop.steps)
        assert config.optim.adamw_lr * share == pytest.approx(expected, rel=1e-9)

"""Checkpoints and resuming, bit for bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import state_in
from helpers.small_runs import small_run
from helpers.tools import tiny_config

from hotlap.common.errors import DataError, Interrupted
from hotlap.common.files import file_sha256
from hotlap.model.gpt import GPT
from hotlap.model.weights import load_model, run_checkpoints
from hotlap.train import pretrain
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.run.checkpoint import Saver
from hotlap.train.run.folder import open_run, run_lock
from hotlap.train.run.metrics import read_metrics
from hotlap.train.run.resume import resume_from
from hotlap.train.run.state import RunState


def trained(seed: int = 0) -> tuple[GPT, MuonAdamW]:
    """A model and optimiser after one step, so that none of their state is trivial."""
    model = GPT(tiny_config(layers=1, context=16)).init_weights(seed)
    optimizer = MuonAdamW(model, OptimConfig())
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def snapshot(model: GPT, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in (*model.state_dict().items(), *optimizer.named_state())}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_restores_weights_optimizer_state_and_randomness(tmp_path, tiny_tokenizer):
    model, optimizer = trained()
    torch.manual_seed(7)
    saved = RunState(step=5, tokens=80, seconds=0.1)
    with joined() as world:
        with Saver(tmp_path, world) as saver:
            saver.save(model, optimizer, tiny_tokenizer, saved)
        drawn = torch.rand(4)
        other, other_optimizer = trained(seed=1)
        assert not equal(snapshot(model, optimizer), snapshot(other, other_optimizer))
        state = resume_from(tmp_path, "auto", other, other_optimizer, world)
    assert equal(snapshot(model, optimizer), snapshot(other, other_optimizer))
    assert state == saved and torch.equal(torch.rand(4), drawn)
    for_chat, tokenizer = load_model(tmp_path, torch.device("cpu"), torch.float32)
    assert torch.equal(for_chat.head.weight, model.head.weight) and tokenizer.sha256 == tiny_tokenizer.sha256


def outcome(run: Path) -> tuple[dict, list]:
    """Hashes of the last checkpoint's tensors, and every loss, bit for bit."""
    folder = run_checkpoints(run)[-1]
    assert folder.name == "step-000012"
    state = json.loads((folder / "state.json").read_text())
    lines = read_metrics(run / "metrics.jsonl")
    losses = [(m["step"], m["tokens"], float.hex(m["loss"]), m.get("validation_loss")) for m in lines]
    return state_in(run) | {"tokens": state["tokens"]}, losses


@pytest.mark.parametrize(
    ("action", "error", "newest"),
    [("raise", ValueError, "step-000006"), ("sigterm", Interrupted, "step-000008")],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch, action, error, newest):
    straight = small_run(tmp_path, out=tmp_path / "straight")
    pretrain.pretrain(straight)
    config = small_run(tmp_path, out=tmp_path / "stopped")
    monkeypatch.setenv("FAULT", f"step:0:7:{action}")
    with pytest.raises(error):
        pretrain.pretrain(config)
    monkeypatch.delenv("FAULT")
    assert run_checkpoints(config.out)[-1].name == newest
    torch.manual_seed(123)  # what the new process starts with must not matter
    pretrain.pretrain(dataclasses.replace(config, resume="auto"))
    assert outcome(config.out) == outcome(straight.out)


def test_resuming_a_finished_run_only_returns_its_metrics(tmp_path):
    config = small_run(tmp_path)
    last = pretrain.pretrain(config)
    before = outcome(config.out)
    again = pretrain.pretrain(dataclasses.replace(config, resume="auto"))
    assert again["validation_loss"] == last["validation_loss"] and outcome(config.out) == before


def test_another_configuration_is_refused_field_by_field(tmp_path):
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    other = dataclasses.replace(
        config, resume="auto", seed=5, model=dataclasses.replace(config.model, layers=2),
        loop=LoopConfig(13, evaluate_every=6, save_every=3),
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        pretrain.pretrain(other)
    for line in (
        "seed: saved 0, current 5",
        "model.layers: saved 1, current 2",
    ):
        assert line in str(caught.value)
    assert str(caught.value).count("saved") == 2


def test_other_data_under_the_same_name_is_refused_on_resuming(tmp_path):
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    shard = config.out / "data" / "train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1024 + 20] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="other data"):
        pretrain.pretrain(dataclasses.replace(config, resume="auto"))


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock")
    return {str(p): file_sha256(p) for p in files}


def test_an_existing_run_is_not_touched_without_resume(tmp_path):
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    before = contents(config.out)
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain.pretrain(dataclasses.replace(config, seed=3))
    assert contents(config.out) == before


def test_a_start_that_failed_before_its_first_step_can_be_corrected(tmp_path):
    config = small_run(tmp_path)
    (tmp_path / "short.txt").write_text("abcdefgh" * 2)
    with pytest.raises(DataError, match=r"model\.context=32"):
        pretrain.pretrain(dataclasses.replace(config, data=str(tmp_path / "short.txt")))
    pretrain.pretrain(config)
    assert outcome(config.out)


def test_a_file_cannot_be_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="cannot be a run's directory"), run_lock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"[{}]", b"3", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_of_a_run_is_named(tmp_path, damaged):
    open_run(tmp_path, OptimConfig(), resume=False)
    (tmp_path / "config.json").write_bytes(damaged)
    (tmp_path / "metrics.jsonl").touch()
    for resume in (False, True):
        with pytest.raises(DataError, match=r"config\.json is not a run's configuration.*--resume"):
            open_run(tmp_path, OptimConfig(), resume=resume)


def test_a_lock_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(FileExistsError, match=r"run\.lock cannot be opened"), run_lock(tmp_path):
        pass
    (tmp_path / "run.lock").rmdir()
    (tmp_path / "run.lock").write_bytes(b"\xff\xfe")
    with run_lock(tmp_path), pytest.raises(ValueError, match="in use by process"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_something_else_in_it_is_refused_and_kept_as_it_is(tmp_path, resume):
    config = small_run(tmp_path, resume=resume)
    (config.out / "data").mkdir(parents=True)
    (config.out / "data" / "train_000000.bin").write_bytes(b"mine")
    (config.out / "config.json").write_text('{"mine": 1}')
    before = contents(config.out)
    with pytest.raises((FileExistsError, ValueError)):
        pretrain.pretrain(config)
    assert contents(config.out) == before
    (config.out / "config.json").unlink()
    with pytest.raises(FileExistsError, match="holds data and no run"):
        pretrain.pretrain(config)
    assert (config.out / "data" / "train_000000.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("at", [6, 12])
def test_a_kill_while_validating_loses_no_line_of_the_metrics(tmp_path, at, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    config = small_run(tmp_path, loop=LoopConfig(12, evaluate_every=at, save_every=3))
    monkeypatch.setattr(pretrain, "validation", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config)
    monkeypatch.undo()
    last = pretrain.pretrain(dataclasses.replace(config, resume="auto"))
    assert [m["step"] for m in read_metrics(config.out / "metrics.jsonl")] == list(range(12))
    assert last["step"] == 11 and "validation_loss" in last

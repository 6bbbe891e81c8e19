"""Checkpoints and resuming: bit for bit, or not at all."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import small_run
from tools import tiny_config

from hotlap.model.errors import DataError, Interrupted
from hotlap.model.gpt import GPT
from hotlap.model.weights import load_model, run_checkpoints
from hotlap.train import checkpoint, pretrain
from hotlap.train.checkpoint import file_sha256, load_checkpoint, save_checkpoint, verify
from hotlap.train.log import read_metrics
from hotlap.train.loop import LoopConfig
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.runs import open_run, resume_from, run_lock

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")


def trained(seed: int = 0) -> tuple[GPT, MuonAdamW]:
    """A model and optimiser after one step, so that all of their state says something."""
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


def saved_run(run: Path, tokenizer, steps=(3, 6)) -> dict[int, dict[str, torch.Tensor]]:
    """A run with checkpoints of different models, and what each holds."""
    held = {}
    for step in steps:
        model, optimizer = trained(seed=step)
        save_checkpoint(run, step, model, optimizer, tokenizer, {"tokens": step * 10})
        held[step] = snapshot(model, optimizer)
    return held


def test_a_checkpoint_gives_back_weights_optimizer_state_and_randomness(tmp_path, tiny_tokenizer):
    model, optimizer = trained()
    torch.manual_seed(7)
    folder = save_checkpoint(tmp_path, 5, model, optimizer, tiny_tokenizer, {"tokens": 80, "seconds": 0.1})
    drawn = torch.rand(4)
    other, other_optimizer = trained(seed=1)
    assert not equal(snapshot(model, optimizer), snapshot(other, other_optimizer))
    state = load_checkpoint(folder, other, other_optimizer)
    assert equal(snapshot(model, optimizer), snapshot(other, other_optimizer))
    assert state == {"step": 5, "tokens": 80, "seconds": 0.1} and torch.equal(torch.rand(4), drawn)
    assert {p.name for p in folder.iterdir()} == {*FILES, "manifest.json"}
    for_chat, tokenizer = load_model(tmp_path, torch.device("cpu"), torch.float32)
    assert torch.equal(for_chat.head.weight, model.head.weight) and tokenizer.sha256 == tiny_tokenizer.sha256


def test_the_newest_two_checkpoints_are_kept(tmp_path, tiny_tokenizer):
    saved_run(tmp_path, tiny_tokenizer, (2, 4, 6, 8))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


class PowerCut(BaseException):
    """What a kill -9 is to a test: nothing after it runs, not even cleaning up."""


def cut_power_at(point: int, monkeypatch) -> list[str]:
    """From the point-th operation of a save on nothing happens any more. Returns the operations so far."""
    done: list[str] = []

    def wrap(owner, name: str) -> None:
        real = getattr(owner, name)

        def operation(*arguments, **options):
            if len(done) >= point:
                if name == "rmtree" and len(done) > point:
                    return None  # of the code that cleans up, which a killed process never reaches
                if name == "rmtree":
                    os.unlink(arguments[0] / "model.safetensors")  # it had come so far
                done.append(name)
                raise PowerCut
            done.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, operation)

    for name in ("save_model", "save_file", "file_sha256", "sync", "check_space"):
        wrap(checkpoint, name)
    for name in ("mkdir", "write_text", "rename", "unlink"):
        wrap(Path, name)
    wrap(checkpoint.shutil, "rmtree")
    return done


def test_wherever_a_save_is_killed_a_whole_checkpoint_is_the_newest(tmp_path, tiny_tokenizer):
    before = tmp_path / "before"
    held = saved_run(before, tiny_tokenizer)
    model, optimizer = trained(seed=9)
    held[9] = snapshot(model, optimizer)
    fresh, fresh_optimizer = trained(seed=1)
    point, survived = 0, False
    while not survived:
        run = tmp_path / f"killed-at-{point}"
        shutil.copytree(before, run)
        with pytest.MonkeyPatch.context() as patch:
            done = cut_power_at(point, patch)
            try:
                save_checkpoint(run, 9, model, optimizer, tiny_tokenizer, {})
                survived = True
            except PowerCut:
                pass
        for folder in run_checkpoints(run):
            verify(folder)
        step, _ = resume_from(run, fresh, fresh_optimizer)
        assert step in (6, 9) and equal(snapshot(fresh, fresh_optimizer), held[step]), done
        assert not list((run / "checkpoints").glob(".tmp-*"))
        save_checkpoint(run, 9, model, optimizer, tiny_tokenizer, {})  # the next life gets there too
        verify(run_checkpoints(run)[-1])
        assert run_checkpoints(run)[-1].name == "step-000009"
        shutil.rmtree(run)
        point += 1
    assert point > 20  # every operation was one to be killed at


def test_an_error_while_saving_leaves_no_half_and_the_checkpoint_before(
    tmp_path, tiny_tokenizer, monkeypatch
):
    saved_run(tmp_path, tiny_tokenizer, (3,))
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        saved_run(tmp_path, tiny_tokenizer, (6,))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused_by_name_and_the_checkpoint_before_is_used(
    tmp_path, tiny_tokenizer, name, caplog
):
    held = saved_run(tmp_path, tiny_tokenizer)
    path = tmp_path / "checkpoints" / "step-000006" / name
    whole = path.read_bytes()
    generator = random.Random(name)
    target = trained()
    for _ in range(10):
        raw = bytearray(whole)
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(DataError, match=name):
            load_checkpoint(path.parent, *target)
    fresh, optimizer = trained()
    step, state = resume_from(tmp_path, fresh, optimizer)
    assert step == 3 and state == {"tokens": 30} and equal(snapshot(fresh, optimizer), held[3])
    assert name in caplog.text and "trying the checkpoint before it" in caplog.text
    assert [p.name for p in run_checkpoints(tmp_path)] == ["step-000003"]
    model, optimizer = trained(seed=6)
    save_checkpoint(tmp_path, 6, model, optimizer, tiny_tokenizer, {})  # written again, not taken for whole
    verify(path.parent)


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_file_that_is_cut_short_or_missing_is_refused_by_name(tmp_path, tiny_tokenizer, name, damage):
    saved_run(tmp_path, tiny_tokenizer, (3,))
    path = tmp_path / "checkpoints" / "step-000003" / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            raw[:-1] if damage == "truncated" and name != "manifest.json" else raw[: len(raw) // 2]
        )
    if damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(DataError, match=name):
        load_checkpoint(path.parent, *trained())


@pytest.mark.parametrize(
    "text", ["[]", '{"files": {}}', '{"format": 99, "files": {}}', '{"format": 1, "files": 3}']
)
def test_a_manifest_that_is_none_is_refused(tmp_path, tiny_tokenizer, text):
    saved_run(tmp_path, tiny_tokenizer, (3,))
    folder = tmp_path / "checkpoints" / "step-000003"
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="step-000003"):
        load_checkpoint(folder, *trained())


def test_a_run_whose_every_checkpoint_is_damaged_is_not_started_over(tmp_path, tiny_tokenizer):
    saved_run(tmp_path, tiny_tokenizer)
    for folder in run_checkpoints(tmp_path):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"no checkpoint of .* can be used"):
        resume_from(tmp_path, *trained())
    assert len(run_checkpoints(tmp_path)) == 2


def test_a_checkpoint_of_another_shape_is_refused_and_never_cast(tmp_path, tiny_tokenizer):
    saved_run(tmp_path, tiny_tokenizer, (3,))
    folder = tmp_path / "checkpoints" / "step-000003"
    deeper = GPT(tiny_config(layers=2, context=16))
    wider = GPT(tiny_config(layers=1, context=16, width=96, heads=3, kv_heads=3))
    half = GPT(tiny_config(layers=1, context=16)).half()
    for model in (deeper, wider, half):
        with pytest.raises(DataError, match=r"model\.safetensors"):
            load_checkpoint(folder, model, MuonAdamW(model, OptimConfig()))


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path, tiny_tokenizer):
    saved_run(tmp_path, tiny_tokenizer, (3,))
    for path in (tmp_path / "checkpoints" / "step-000003").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"


def die_in_step(number: int, patch, error: BaseException | None = None):
    """Make the pretraining's data end with an error, or with a SIGTERM to this process, in a step."""
    real = pretrain.prefetch

    def prefetch(items):
        for i, item in enumerate(real(items)):
            if i == number and error:
                raise error
            if i == number:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    patch.setattr(pretrain, "prefetch", prefetch)


def outcome(run: Path) -> tuple[dict, list]:
    """Hashes of what the last checkpoint holds, and every loss, bit for bit."""
    folder = run_checkpoints(run)[-1]
    assert folder.name == "step-000012"
    hashes = {name: file_sha256(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}
    state = json.loads((folder / "state.json").read_text())
    lines = read_metrics(run / "metrics.jsonl")
    losses = [(m["step"], m["tokens"], float.hex(m["loss"]), m.get("validation_loss")) for m in lines]
    return hashes | {"tokens": state["tokens"]}, losses


@pytest.mark.parametrize("end", ["crash", "SIGTERM"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_never_stopped(tmp_path, end):
    straight = small_run(tmp_path, out=tmp_path / "straight")
    pretrain.pretrain(straight)
    config = small_run(tmp_path, out=tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        die_in_step(7, patch, PowerCut() if end == "crash" else None)
        with pytest.raises(PowerCut if end == "crash" else Interrupted):
            pretrain.pretrain(config)
    newest = run_checkpoints(config.out)[-1].name
    assert newest == ("step-000006" if end == "crash" else "step-000008")
    torch.manual_seed(123)  # what the new process starts with must not matter
    pretrain.pretrain(dataclasses.replace(config, resume=True))
    assert outcome(config.out) == outcome(straight.out)


def test_a_run_that_is_complete_only_validates_when_it_is_resumed(tmp_path):
    config = small_run(tmp_path)
    last = pretrain.pretrain(config)
    before = outcome(config.out)
    again = pretrain.pretrain(dataclasses.replace(config, resume=True))
    assert again["validation_loss"] == last["validation_loss"] and outcome(config.out) == before


def test_another_configuration_is_refused_field_by_field(tmp_path):
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    other = dataclasses.replace(
        config, resume=True, seed=5, model=dataclasses.replace(config.model, layers=2),
        loop=LoopConfig(13, evaluate_every=6, save_every=3),
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        pretrain.pretrain(other)
    for line in (
        "seed: saved 0, current 5",
        "model.layers: saved 1, current 2",
        "loop.steps: saved 12, current 13",
    ):
        assert line in str(caught.value)
    assert str(caught.value).count("saved") == 3


def test_other_data_under_the_same_name_is_refused_on_resuming(tmp_path):
    config = small_run(tmp_path)
    pretrain.pretrain(config)
    shard = config.out / "data" / "train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1024 + 20] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="other data"):
        pretrain.pretrain(dataclasses.replace(config, resume=True))


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


def test_a_second_process_in_a_run_is_refused_naming_the_first(tmp_path):
    code = (
        "import sys, pathlib; from hotlap.train.runs import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], **pipes) as first:
        try:
            assert first.stdout.readline() == "held\n"
            with (
                pytest.raises(ValueError, match=f"in use by process {first.pid} on "),
                run_lock(tmp_path / "run"),
            ):
                pass
        finally:
            first.stdin.close()
    with run_lock(tmp_path / "run"):  # free again
        pass


def test_a_file_cannot_be_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="cannot be a run's directory"), run_lock(tmp_path / "file"):
        pass


def test_a_spoilt_configuration_of_a_run_is_named(tmp_path):
    open_run(tmp_path, OptimConfig(), resume=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not a run's configuration"):
        open_run(tmp_path, OptimConfig(), resume=True)


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
    last = pretrain.pretrain(dataclasses.replace(config, resume=True))
    assert [m["step"] for m in read_metrics(config.out / "metrics.jsonl")] == list(range(12))
    assert last["step"] == 11 and "validation_loss" in last

"""Models written for others: the same weights, in one file, over nothing that was there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import saved
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE, assert_error
from safetensors.torch import load_file

from hotlap.cli import main
from hotlap.model.weights import load_model, run_checkpoints, stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 ranks."""
    run = tmp_path_factory.mktemp("run")
    saved(run, 3, size=2)
    return run


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_shards_become_one_file_with_the_same_weights(run, tmp_path, capsys, given):
    model = run if given == "run" else run_checkpoints(run)[0]
    out = tmp_path / "deep" / "model"
    assert main(["export", "weights", "--model", str(model), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    (original, tokenizer), (copy, same) = (load_model(path, CPU, torch.float32) for path in (run, out))
    assert copy.config == original.config and same.sha256 == tokenizer.sha256
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in original.state_dict().items())


def test_a_base_model_stays_known_as_one(run, tmp_path):
    shutil.copytree(run_checkpoints(run)[0], tmp_path / "base")
    (tmp_path / "base" / "manifest.json").unlink()
    (tmp_path / "base" / "state.json").write_text(json.dumps({"stage": "pretrain", "step": 3}))
    assert main(["export", "weights", "--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 0
    assert stage(tmp_path / "out") == "pretrain"


def test_a_folder_that_holds_something_is_not_written_to(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--model", str(run), "--out", str(out)]
    (out / "mine").write_text("mine")
    assert_error(capsys, main(["export", "weights", *flags]), CANNOT_CREATE, "out exists already", "--out")
    assert [p.name for p in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert main(["export", "weights", *flags]) == 0


def test_an_empty_folder_stays_the_one_it_was(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", "weights", "--model", str(run), "--out", "."]) == 0
    assert sorted(os.listdir(".")) == ["config.json", "model.safetensors", "tokenizer.json"]
    for path in Path().iterdir():
        path.unlink()
    assert main(["export", "weights", "--model", str(run), "--out", str(tmp_path / "link")]) == 0
    assert len(os.listdir(".")) == 3


@pytest.mark.parametrize("command", ["weights", "gguf"])
def test_a_link_to_nothing_is_not_written_over(run, tmp_path, capsys, command):
    (tmp_path / "out").symlink_to("nowhere")
    code = main(["export", command, "--model", str(run), "--out", str(tmp_path / "out")])
    assert_error(capsys, code, CANNOT_CREATE, "out exists already", "--out")


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
    assert_error(capsys, main(["export", "waits"]), USAGE, "'waits'", "did you mean 'weights'?")
    missing = main(["export", "weights", "--model", "none", "--out", str(tmp_path / "out")])
    assert_error(capsys, missing, NO_INPUT, "no model at none")
    shutil.copytree(run, tmp_path / "damaged")
    shard = next(run_checkpoints(tmp_path / "damaged")[0].glob("shard-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = main(
        ["export", "weights", "--model", str(tmp_path / "damaged"), "--out", str(tmp_path / "out")]
    )
    assert_error(capsys, damaged, BAD_DATA, shard.name)
    assert not (tmp_path / "out").exists()

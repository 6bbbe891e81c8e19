"""Folders with adapters: merged into their base as they are loaded, and refused if it is not the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapted, write_base
from helpers.tools import relative_error, tiny_config
from safetensors.torch import load_file, save_file

from hotlap.common.errors import DataError
from hotlap.model.adapter_files import ADAPTER, weights_sha256
from hotlap.model.config import ExportConfig
from hotlap.model.export import export_weights
from hotlap.model.weights import WEIGHTS, find_models, load_model, model_folder

CPU, IDS = torch.device("cpu"), torch.arange(60)[None]
SHAPE = tiny_config()


@pytest.fixture
def base(tmp_path, random_model, tiny_tokenizer) -> Path:
    return write_base(tmp_path / "all" / "base", random_model(SHAPE), tiny_tokenizer)


@pytest.fixture
def folder(base, tiny_tokenizer) -> Path:
    write_adapted(base.parent / "tuned", base, SHAPE, tiny_tokenizer)
    return base.parent / "tuned"


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, CPU, torch.float32)[0](IDS)


def test_a_folder_of_adapters_is_a_model(base, tiny_tokenizer):
    model = write_adapted(base.parent / "tuned", base, SHAPE, tiny_tokenizer)
    with torch.no_grad():
        assert relative_error(logits(base.parent / "tuned"), model(IDS).double()) < 1e-5
    assert base.parent / "tuned" in find_models(base.parent)


def test_an_export_has_merged_weights_and_no_base(folder, base):
    out = export_weights(ExportConfig(folder, folder.parent / "out"))
    before = logits(folder)
    shutil.rmtree(base)
    assert torch.equal(logits(out), before)
    assert not (out / ADAPTER).exists()


def test_adapters_on_adapters_build_on_both(folder, tiny_tokenizer):
    second = folder.parent / "second"
    model = write_adapted(second, folder, SHAPE, tiny_tokenizer, seed=7)
    sha256 = json.loads((second / ADAPTER).read_text())["base_sha256"]
    assert sha256 == weights_sha256([folder])
    fields = json.loads((second / ADAPTER).read_text())
    fields["base_sha256"] = weights_sha256([folder, folder.parent / "base"])
    (second / ADAPTER).write_text(json.dumps(fields))
    with torch.no_grad():
        assert relative_error(logits(second), model(IDS).double()) < 1e-5


def test_runs_that_are_moved_together_find_their_base(folder):
    before = logits(folder)
    folder.parent.rename(folder.parent.parent / "moved")
    assert torch.equal(logits(folder.parent.parent / "moved" / "tuned"), before)


def test_a_base_that_is_missing_is_named_with_what_to_do(folder, base):
    base.rename(base.parent / "elsewhere")
    said = r"tuned has adapters for the base .*base \(weights of sha256 .* move"
    with pytest.raises(FileNotFoundError, match=said):
        load_model(folder, CPU)


def test_a_base_whose_weights_have_changed_is_refused(folder, base):
    weights = load_file(base / WEIGHTS)
    weights["head.weight"][3, 3] += 1e-3
    save_file(weights, base / WEIGHTS)
    said = r"for other weights than .*base holds now: saved sha256 \w+\.\.\., current"
    with pytest.raises(DataError, match=said):
        load_model(folder, CPU)


def test_a_hash_of_weights_does_not_depend_on_their_files(base):
    before, weights = weights_sha256([base]), load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    names = sorted(weights)
    for i, some in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in some}, base / f"part-{i}.safetensors")
    assert weights_sha256([base]) == before


def test_adapters_that_do_not_fit_are_named(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["blocks.0.mlp.fc.adapter.A"] = tensors["blocks.0.mlp.fc.adapter.A"][:-1].clone()
    del tensors["blocks.1.mlp.fc.adapter.B"]
    save_file(tensors, folder / WEIGHTS)
    said = r"blocks\.0\.mlp\.fc\.adapter\.A: saved .*; blocks\.1\.mlp\.fc\.adapter\.B"
    with pytest.raises(DataError, match=said):
        load_model(folder, CPU)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("alpha", "x"), ("base", None), ("base_sha256", 3)])
def test_a_damaged_description_is_named(folder, name, value):
    fields = json.loads((folder / ADAPTER).read_text())
    (folder / ADAPTER).write_text(json.dumps(fields | {name: value}))
    with pytest.raises(DataError, match=rf"adapter\.json: {name}={value!r}"):
        model_folder(folder) and load_model(folder, CPU)


def test_adapters_whose_base_is_themselves_end(folder):
    fields = json.loads((folder / ADAPTER).read_text())
    (folder / ADAPTER).write_text(json.dumps(fields | {"base": str(folder)}))
    with pytest.raises(DataError, match="built on them"):
        load_model(folder, CPU)

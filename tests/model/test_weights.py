"""Model directories: bit for bit, named errors, and nothing that runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.tools import tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hotlap.common.errors import DataError
from hotlap.model.gpt import GPT
from hotlap.model.weights import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    find_models,
    load_model,
    model_folder,
    save_model,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, random_model, tiny_tokenizer):
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, random_model(tiny_config()), tiny_tokenizer)
    return folder


def test_a_saved_model_is_the_same_bit_for_bit(tmp_path, random_model, tiny_tokenizer):
    model = random_model(tiny_config(softcap=7.0))
    save_model(tmp_path, model, tiny_tokenizer)
    loaded, tokenizer = load_model(tmp_path, CPU, torch.float32)
    assert loaded.config == model.config and not loaded.training
    assert tokenizer.sha256 == tiny_tokenizer.sha256
    for (name, one), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype, name
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), loaded(ids))  # with the tables that are not in the file
    assert load_model(tmp_path, CPU, torch.bfloat16)[0].compute_dtype == torch.bfloat16


def smaller(tensors):
    tensors["head.weight"] = tensors["head.weight"][:-1].clone()


def halved(tensors):
    tensors["head.weight"] = tensors["head.weight"].half()


def missing(tensors):
    del tensors["head.weight"]


def unknown(tensors):
    tensors["head.weight.bias"] = torch.zeros(3)


@pytest.mark.parametrize("damage", [smaller, halved, missing, unknown], ids=lambda f: f.__name__)
def test_a_tensor_that_does_not_fit_is_named(damage, folder):
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(DataError, match=r"does not fit the model: head\.weight.*: saved .*, current "):
        load_model(folder, CPU, torch.float32)


@pytest.fixture
def sharded(tmp_path, random_model, tiny_tokenizer):
    """The same model in two shards, as 2 ranks write them."""
    folder, model = tmp_path / "sharded", random_model(tiny_config())
    folder.mkdir()
    save_model(folder, model, tiny_tokenizer)
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for rank in range(2):
        parts = {name: tensor.chunk(2)[rank] for name, tensor in whole.items() if len(tensor.chunk(2)) > rank}
        starts = {
            name: {"saved_offsets": [rank * len(tensor.chunk(2)[0]), *[0] * (tensor.ndim - 1)]}
            for name, tensor in whole.items()
        }
        save_file(parts, folder / shard(rank), {"DCP_SHARDING_INFO": json.dumps(starts)})
    return folder


def shard(rank: int) -> str:
    return f"shard-0000{rank + 1}-model-00001-of-00001.safetensors"


def test_shards_are_read_as_the_whole_that_they_make(sharded, folder):
    one, other = (load_model(path, CPU, torch.float32)[0].state_dict() for path in (folder, sharded))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    "offsets",
    ["{", "[]", "3", '{"head.weight": {}}', '{"head.weight": {"saved_offsets": [0, -1]}}', "[" * 9999],
)
def test_shards_that_do_not_say_where_they_begin_are_refused_by_name(offsets, sharded):
    path = sharded / shard(1)
    save_file({"head.weight": load_file(path)["head.weight"]}, path, {"DCP_SHARDING_INFO": offsets})
    with pytest.raises(DataError, match=shard(1)):
        load_model(sharded, CPU, torch.float32)


def test_shards_of_another_dtype_are_refused(sharded):
    path = sharded / shard(1)
    with safe_open(path, "pt") as file:
        offsets = file.metadata()
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, offsets)
    with pytest.raises(DataError, match="has another dtype or shape in another file"):
        load_model(sharded, CPU, torch.float32)


def test_a_model_is_loaded_without_what_only_training_on_several_gpus_needs(folder):
    code = (
        "import sys, torch; from hotlap.model.weights import load_model;"
        f"load_model({str(folder)!r}, torch.device('cpu'), torch.float32);"
        "needless = {'torch.distributed.checkpoint', 'torch.distributed.tensor', 'torch._dynamo'};"
        "print(needless & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_which_one_is_missing_are_refused(sharded, rank):
    (sharded / shard(rank)).unlink()
    with pytest.raises(DataError, match=r"head\.weight: saved (\[160, 64\] float32|incomplete)|and \d+ more"):
        load_model(sharded, CPU, torch.float32)


def test_weights_that_are_there_twice_are_refused(sharded, folder):
    shutil.copy(folder / WEIGHTS, sharded / WEIGHTS)
    with pytest.raises(DataError, match="saved incomplete parts"):
        load_model(sharded, CPU, torch.float32)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, CONFIG])
@pytest.mark.parametrize("dump", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_a_pickle_is_refused_and_does_not_run(name, dump, folder, tmp_path):
    sprung = tmp_path / "sprung"
    with open(folder / name, "wb") as file:
        dump({"head.weight": Trap(sprung)}, file)
    with pytest.raises(DataError, match=name):
        load_model(folder, CPU, torch.float32)
    assert not sprung.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_off_weights_are_a_data_error(keep, folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(DataError, match=WEIGHTS):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"width": 64}', '"width"'],
)
def test_a_damaged_config_is_a_data_error(content, folder):
    (folder / CONFIG).write_text(content)
    with pytest.raises(DataError, match=CONFIG):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize(
    "field, value",
    [("width", 65), ("width", "64"), ("width", 64.0), ("heads", True), ("smear", "no"), ("softcap", None)],
)
def test_a_config_field_that_cannot_be_is_named(field, value, folder):
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {field: value}))
    with pytest.raises(DataError, match=rf"{CONFIG}.*{field}"):
        load_model(folder, CPU, torch.float32)


def test_a_tokenizer_larger_than_the_model_is_not_of_its_run(folder, random_model, tiny_tokenizer):
    save_model(folder, random_model(tiny_config(vocab_size=299)), tiny_tokenizer)
    with pytest.raises(DataError, match="299 ids, its tokenizer 300"):
        load_model(folder, CPU, torch.float32)


def checkpoint(run, step, tokenizer, finished=True):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_model(folder, GPT(tiny_config()).init_weights(), tokenizer)
    if finished:
        (folder / MANIFEST).write_text("{}")
    return folder


def test_a_run_means_its_newest_finished_checkpoint(tmp_path, tiny_tokenizer):
    run = tmp_path / "run"
    checkpoint(run, 9, tiny_tokenizer)
    newest = checkpoint(run, 10, tiny_tokenizer)
    checkpoint(run, 11, tiny_tokenizer, finished=False)
    assert model_folder(run) == newest and model_folder(newest) == newest


def test_a_wrong_path_lists_what_there_is(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model at runs/none; none found under runs/"):
        model_folder("runs/none")
    checkpoint(tmp_path / "runs" / "first", 1, tiny_tokenizer)
    (tmp_path / "runs" / "second").mkdir()
    save_model(tmp_path / "runs" / "second", GPT(tiny_config()).init_weights(), tiny_tokenizer)
    for wrong in ("runs/none", "runs", "runs/second/config.json", "runs/first/checkpoints"):
        with pytest.raises(FileNotFoundError, match=rf"{wrong}.*; found: .*runs/first.*runs/second"):
            model_folder(wrong)


def test_a_path_without_a_model_says_what_is_there_and_what_to_do(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = checkpoint(tmp_path / "run", 1, tiny_tokenizer).relative_to(tmp_path)
    checkpoint(tmp_path / "stopped", 1, tiny_tokenizer, finished=False)
    for folder in (whole / "optimizer", "shards", "half", "notes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "train_000000.bin").touch()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "half" / CONFIG).write_text("{}")
    for path, said in {
        "notes/a.txt": "notes/a.txt is a file, not the folder of a run or model; none found",
        "runs": "runs is a file",
        str(whole / "optimizer"): f"a part of a checkpoint; give {whole}",
        "shards": "has token shards and no model; train one on them with `hotlap pretrain --data shards`",
        "stopped": "is a run without a complete checkpoint; train it on with --resume auto",
        "half": "is no whole model: it lacks tokenizer.json and *.safetensors; copy or export it again",
        "notes": "no model in the folder notes",
        "x" * 300: "no model at xxx",
    }.items():
        with pytest.raises(FileNotFoundError) as caught:
            model_folder(path)
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_models_are_found_beside_what_cannot_be_read(tmp_path, tiny_tokenizer, monkeypatch):
    checkpoint(tmp_path / "run", 1, tiny_tokenizer)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoints").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    checkpoint(tmp_path / "closed", 1, tiny_tokenizer)
    stat = os.stat

    def refusing(path, *given, **named):
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", refusing)
    assert find_models(tmp_path) == [tmp_path / "run"]
    assert find_models(tmp_path / "loop") == find_models(tmp_path / "broken" / "checkpoints") == []


def test_without_a_path_the_newest_model_is_meant(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model at runs; none found .* `make demo`"):
        model_folder(None)
    for name, seconds in (("b", 1000), ("c", 3000), ("a", 2000)):
        run = tmp_path / "runs" / name
        checkpoint(run, 1, tiny_tokenizer)
        (run / "config.json").write_text("{}")
        os.utime(run / "config.json", (seconds, seconds))
    assert str(model_folder(None)) == "runs/c/checkpoints/step-00000001"


@pytest.mark.gpu
def test_loading_to_a_gpu_holds_the_model_there_once(tmp_path, tiny_tokenizer):
    config = tiny_config(vocab_size=8192, width=512, heads=4, kv_heads=4)
    save_model(tmp_path, GPT(config).init_weights(), tiny_tokenizer)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model, _ = load_model(tmp_path, torch.device("cuda"), torch.bfloat16)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert torch.cuda.max_memory_allocated() - before < 1.1 * held + (1 << 20)

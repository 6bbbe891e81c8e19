"""Fine-tuning with adapters: only they change and are saved, on any number of ranks, and they resume."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.ranks import Failed, run_ranks
from helpers.run_functions import GENTLE, fine_tuning, losses, metrics, pretraining, state_of
from safetensors.torch import load_file, save_file

from hotlap.common.files import file_sha256
from hotlap.model.lora import adapter_shapes
from hotlap.model.tensors import stored_tensors
from hotlap.model.weights import load_config, load_model, run_checkpoints
from hotlap.train.loop import LoopConfig
from hotlap.train.run.retention import NEEDED, mark_needed

CPU = torch.device("cpu")
STEPS = 6
LORA = {
    "lora_rank": 4,
    "optim": dataclasses.replace(GENTLE, adapter_lr=0.002),
    "loop": LoopConfig(STEPS, evaluate_every=STEPS, save_every=2),
}
tuning = partial(fine_tuning, **LORA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a chat model, the base, and a run beside it."""
    folder = tmp_path_factory.mktemp("lora")
    run_ranks(1, partial(pretraining, steps=8), str(folder), "pretrained")
    run_ranks(1, partial(fine_tuning, loop=LoopConfig(4, 4, 4)), str(folder), "base", "pretrained")
    run_ranks(1, tuning, str(folder), "tuned", "base")
    return folder


def files_of(run: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in run.rglob("*") if path.is_file()}


def longer(folder: Path) -> dict:
    """What goes on from the run in another folder."""
    data, resume = str(folder / "tuned.jsonl"), str(folder / "tuned")
    return {"data": data, "resume": resume, "loop": LoopConfig(STEPS + 2, 99, 99)}


def differences(run: Path, reference: Path) -> list[float]:
    pairs = zip(metrics(run), metrics(reference), strict=True)
    return [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs]


def test_a_checkpoint_has_adapters_and_nothing_of_the_base(folder):
    before = files_of(folder / "base")
    run_ranks(1, tuning, str(folder), "other", "base")
    after = files_of(folder / "base")
    assert all(after[path] == before[path] for path in before if not path.endswith(NEEDED))
    newest = run_checkpoints(folder / "other")[-1]
    shapes = adapter_shapes(load_config(newest), 4)
    weights, states = stored_tensors(newest), stored_tensors(newest / "optimizer")
    assert {name.split(".", 2)[2]: tensor.shape for name, tensor in weights.items()} == shapes
    assert {name.split("/")[0] for name in states} == set(weights)
    assert losses(folder / "other") == losses(folder / "tuned")


def test_training_lowers_the_loss_and_the_run_is_the_model_that_it_validated(folder):
    first, *_, last = metrics(folder / "tuned")
    assert last["loss"] < first["loss"]
    model, _ = load_model(folder / "tuned", CPU, torch.float32)
    base, _ = load_model(folder / "base", CPU, torch.float32)
    changed = [
        name
        for (name, a), (_, b) in zip(model.named_parameters(), base.named_parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    layers = ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")
    assert changed == [f"blocks.0.{name}.weight" for name in layers]


@pytest.mark.parametrize(
    ("size", "fields"),
    [(1, {"micro_batch": "4"}), (2, {}), (3, {"micro_batch": "2"}), (2, {"recompute": "block"}),
     (1, {"recompute": "selective"})],
)  # fmt: skip
def test_ranks_accumulation_and_recomputing_do_not_change_losses(folder, size, fields):
    name = f"tuned-{size}-{'-'.join(fields.values())}"
    run_ranks(size, partial(tuning, **fields), str(folder), name, "base")
    assert max(differences(folder / name, folder / "tuned")) < 1e-5
    one, other = (load_model(folder / run, CPU, torch.float32)[0] for run in ("tuned", name))
    for (parameter, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), parameter


def test_ranks_agree_in_bfloat16(folder):
    for size in (1, 2):
        run_ranks(size, partial(tuning, dtype="bfloat16"), str(folder), f"low-{size}", "base")
    assert max(differences(folder / "low-2", folder / "low-1")) < 0.01


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_failed_resumes_bit_for_bit_and_on_other_ranks_too(folder, size):
    name = f"failed-{size}"
    with pytest.raises(Failed, match="injected at step, step 5"):
        run_ranks(size, tuning, str(folder), name, "base", env={"FAULT": "step:0:5:raise"})
    shutil.copytree(folder / name, folder / f"{name}-elsewhere")
    run_ranks(size, partial(tuning, resume="auto"), str(folder), name, "base")
    if size == 1:
        assert losses(folder / name) == losses(folder / "tuned")
        assert state_of(folder / name) == state_of(folder / "tuned")
    other = f"{name}-elsewhere"
    (folder / f"{other}.jsonl").unlink(missing_ok=True)
    shutil.copy(folder / f"{name}.jsonl", folder / f"{other}.jsonl")
    data = {"data": str(folder / f"{name}.jsonl")}
    run_ranks(3 - size, partial(tuning, resume="auto", **data), str(folder), other, "base")
    assert max(differences(folder / other, folder / "tuned")) < 1e-5


def test_a_base_that_has_never_seen_a_turn_is_refused(folder):
    with pytest.raises(ValueError, match=r"lora_rank=4, but .*pretrained is a base model"):
        tuning(str(folder), "refused", "pretrained")
    assert not (folder / "refused").exists()


def test_adapters_can_be_trained_beside_a_model_with_adapters(folder):
    run_ranks(1, tuning, str(folder), "second", "tuned")
    assert metrics(folder / "second")[0]["loss"] < metrics(folder / "tuned")[0]["loss"]
    load_model(folder / "second", CPU)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lora_rank": 3}, r"other adapters: lora_rank: saved 4, current 3"),
        ({"lora_alpha": 16.0}, r"other adapters: lora_alpha: saved 32.0, current 16.0"),
        ({"lora_rank": 0}, r"other adapters: lora_rank: saved 4, current 0"),
    ],
)
def test_another_rank_is_not_resumed(folder, fields, says):
    with pytest.raises(ValueError, match=says):
        tuning(str(folder), "refused", "base", **longer(folder), **fields)
    assert not (folder / "refused").exists()
    here = partial(tuning, str(folder), "tuned", "base", resume="auto")
    with pytest.raises(ValueError, match="start a new run with another --out"):
        here(**fields)


def test_a_base_that_is_trained_on_keeps_the_checkpoint_that_adapters_need(folder):
    run_ranks(1, partial(fine_tuning, loop=LoopConfig(4, 4, 4)), str(folder), "going", "pretrained")
    run_ranks(1, tuning, str(folder), "beside", "going")
    before = load_model(folder / "beside", CPU, torch.float32)[0]
    more = partial(fine_tuning, loop=LoopConfig(10, 2, 2), resume="auto")
    run_ranks(1, more, str(folder), "going", "pretrained")
    names = [path.name for path in run_checkpoints(folder / "going")]
    assert names == ["step-000004", "step-000008", "step-000010"]
    after = load_model(folder / "beside", CPU, torch.float32)[0]
    assert all(map(torch.equal, before.parameters(), after.parameters()))


def test_a_base_that_cannot_be_marked_is_said_to_be_in_danger(tmp_path, caplog):
    base = tmp_path / "run" / "checkpoints" / "step-000001"
    (base / NEEDED).mkdir(parents=True)
    mark_needed(base, tmp_path)
    assert f"{base} cannot be marked as needed" in caplog.text


def test_another_base_is_not_resumed(folder):
    shutil.copytree(run_checkpoints(folder / "base")[-1], folder / "changed")
    (folder / "changed" / "manifest.json").unlink()
    (path,) = (folder / "changed").glob("*.safetensors")
    weights = load_file(path)
    weights["head.weight"][0, 0] += 1
    path.unlink()
    save_file(weights, folder / "changed" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"saved sha256 .*, current .*; --base must be what .*/base/checkpoints/step-"
    ):
        tuning(str(folder), "refused", "changed", **longer(folder))

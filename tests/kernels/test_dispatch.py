import dataclasses
import importlib
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kernel_tools import DEVICE
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hotlap.bench import static, tune
from hotlap.kernels import attention_hopper, dispatch, orthogonalize, tiles
from hotlap.kernels.dispatch import Device, constant, use_triton
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.tiles import Tile, pick_tile, tuned_file, write_tuned
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT


def test_the_choice_is_logged_once_with_its_reason(choose_kernels, caplog):
    choose_kernels("torch")
    with caplog.at_level(logging.INFO, "hotlap"):
        assert not use_triton(torch.ones(1)) and not use_triton(torch.ones(2))
    assert [record.getMessage() for record in caplog.records] == ["kernels: torch (HOTLAP_KERNELS=torch)"]


@pytest.mark.parametrize(
    ("device_type", "there_is_triton", "choice"),
    [("cpu", True, "c"), ("cpu", False, "c"), ("mps", True, "torch"), ("cuda", False, "torch")],
)
def test_without_a_wish_triton_runs_only_on_gpus_and_c_on_cpus(
    device_type, there_is_triton, choice, choose_kernels, monkeypatch
):
    choose_kernels("")
    if not there_is_triton:
        monkeypatch.setattr(dispatch, "triton", None)
    assert dispatch.kernel_choice(device_type) == choice


def test_a_wish_that_cannot_be_met_says_what_to_do(choose_kernels, monkeypatch):
    choose_kernels("cutlass")
    with pytest.raises(ValueError, match="torch, triton or c"):
        use_triton(torch.ones(1))
    choose_kernels("triton")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        patch.setattr(dispatch, "INTERPRETED", False)
        use_triton(torch.ones(1))
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="no Triton"):
        use_triton(torch.ones(1))


def test_kernels_leave_float64_and_meta_tensors_to_torch(triton_kernels):
    assert use_triton(torch.ones(1, device=DEVICE))
    assert not use_triton(torch.ones(1, device=DEVICE, dtype=torch.float64))
    assert not use_triton(torch.ones(1, device="meta"))


def test_what_watches_or_imitates_tensors_sees_the_operation(triton_kernels):
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            names.append(function.name())
            return function(*arguments, **(keywords or {}))

    with Watch():
        relu2(torch.ones(3, device=DEVICE))
    assert "hotlap::relu2" in names
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3, device=DEVICE))
        assert relu2(x).shape == (3,)
    assert relu2(x).shape == (3,)


SMALL, LARGE = Tile({"BLOCK": 16}, shared=1000), Tile({"BLOCK": 64}, warps=16, shared=90_000)


def a_table_of_tiles(size, device):
    return [LARGE, SMALL]


def test_a_tile_that_does_not_fit_the_device_is_not_picked():
    assert pick_tile(a_table_of_tiles, 1, Device("roomy", 100_000, 8)) == LARGE
    assert pick_tile(a_table_of_tiles, 1, Device("narrow", 65_536, 8)) == SMALL
    assert pick_tile(a_table_of_tiles, 1, Device("wide warps", 100_000, 8, warp=128)) == SMALL
    with pytest.raises(ValueError, match="no tile of a_table_of 1 fits tiny"):
        pick_tile(a_table_of_tiles, 1, Device("tiny", 100, 8))


def test_a_measured_tile_is_preferred_for_its_size_and_device(cache):
    write_tuned("A GPU/1", {"a_table_of 1": SMALL}, {})
    device = Device("A GPU/1", 100_000, 8)
    assert pick_tile(a_table_of_tiles, 1, device) == SMALL
    assert pick_tile(a_table_of_tiles, 2, device) == LARGE
    assert pick_tile(a_table_of_tiles, 1, device._replace(name="another")) == LARGE


def test_a_measured_tile_counts_only_while_the_table_holds_it_and_triton_is_the_same(cache):
    device = Device("gpu", 100_000, 8)
    path = write_tuned("gpu", {"a_table_of 1": Tile({"BLOCK": 32})}, {})
    assert pick_tile(a_table_of_tiles, 1, device) == LARGE
    write_tuned("gpu", {"a_table_of 1": SMALL}, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "2.0"}))
    assert pick_tile(a_table_of_tiles, 1, device) == LARGE


def test_what_comes_with_the_kernels_counts_until_the_device_is_measured_here(cache, monkeypatch):
    device, shipped = Device("gpu", 100_000, 8), cache / "shipped.json"
    stored = {"triton": "2.0", "tiles": {"a_table_of 1": dataclasses.asdict(SMALL)}, "choices": {"a": "b"}}
    shipped.write_text(json.dumps(stored))
    monkeypatch.setattr(tiles, "shipped_file", lambda compute: shipped)
    assert pick_tile(a_table_of_tiles, 1, device) == SMALL and tiles.tuned(device).choices == {"a": "b"}
    write_tuned("gpu", {"a_table_of 1": LARGE}, {})
    assert pick_tile(a_table_of_tiles, 1, device) == LARGE and tiles.tuned(device).choices == {"a": "b"}


def test_a_gpu_like_one_that_was_measured_takes_its_tiles_and_says_so_once(cache, monkeypatch, caplog):
    stored = {"device": "H100", "triton": "2.0", "tiles": {"a_table_of 1": dataclasses.asdict(SMALL)}}
    (cache / "sm_90.json").write_text(json.dumps(stored))
    monkeypatch.setattr(tiles, "shipped_file", lambda compute: cache / f"sm_{compute}.json")
    h100 = Device("H100", 100_000, 8, compute=90)
    assert pick_tile(a_table_of_tiles, 1, h100) == SMALL and not caplog.messages
    for size, tile in ((1, SMALL), (2, LARGE)):
        assert pick_tile(a_table_of_tiles, size, h100._replace(name="H200")) == tile
    assert caplog.messages == ["tiles of kernels are those for an H100; for this GPU's: hotlap bench tune"]
    assert pick_tile(a_table_of_tiles, 1, h100._replace(name="B200", compute=100)) == LARGE
    write_tuned("H200", {"a_table_of 1": LARGE}, {})
    assert pick_tile(a_table_of_tiles, 1, h100._replace(name="H200")) == LARGE and len(caplog.messages) == 1


def test_every_table_that_comes_with_the_kernels_can_be_read_and_names_tiles_that_there_are():
    device = Device("NVIDIA H100 80GB HBM3", 232448, 132, tma=True, compute=90)
    found = {}
    for name in static.MODULES:
        for case in importlib.import_module(f"hotlap.kernels.{name}").cases(torch.bfloat16):
            found[tiles.tile_key(case.table, case.size)] = tiles.fitting_tiles(case.table, case.size, device)
    for path in Path(tiles.__file__).parent.glob("tuned/*.json"):
        measured, choices, name = tiles.read_tuned(path, any_triton=True)
        assert measured and choices and path == tiles.shipped_file(int(path.stem.removeprefix("sm_")))
        if name == device.name:
            for key, tile in measured.items():
                absent = "hopper" in tile.kernel and attention_hopper.MISSING  # Gluon, from the interpreter
                assert absent or tile in found[key], key


def test_where_the_gram_form_pays_is_what_was_measured_on_the_device(cache, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(orthogonalize, "device_facts", lambda _: Device("gpu", 100_000, 8))
    assert orthogonalize.gram_aspect(gpu) == orthogonalize.GRAM_ASPECT
    for times, least in (
        ({2: (1.0, 1.1), 3: (1.0, 1.5), 4: (1.0, 2.0)}, 2),
        ({2: (1.2, 1.1), 3: (1.0, 1.5), 4: (1.0, 2.0)}, 3),
        ({2: (1.0, 1.1), 3: (1.0, 1.5), 4: (1.0, 1.0)}, math.inf),
    ):
        assert tune.from_where(times) == least
        write_tuned("gpu", {}, {orthogonalize.GRAM_CHOICE: str(tune.from_where(times))})
        assert orthogonalize.gram_aspect(gpu) == least


def test_a_damaged_file_of_measured_tiles_is_named(cache):
    path = tuned_file("gpu")
    path.parent.mkdir(parents=True)
    path.write_text('{"tiles": {"x": [1]}}')
    with pytest.raises(ValueError, match=r"gpu\.json is damaged"):
        pick_tile(a_table_of_tiles, 1, Device("gpu", 100_000, 8))


def test_a_model_compiles_whole_and_without_triton_everything_runs_in_torch():
    code = """
import sys, torch
sys.modules["triton"] = None
from hotlap.kernels import dispatch
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
assert dispatch.triton is None
model = GPT(GPTConfig(vocab_size=17, width=32, layers=1, heads=1, kv_heads=1, context=8)).init_weights()
ids = torch.zeros(1, 8, dtype=torch.int64)
torch.compile(model, fullgraph=True, backend="aot_eager")(ids, ids).backward()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_torch_and_triton_train_a_model_to_the_same_losses(choose_kernels):
    if dispatch.triton is None:
        pytest.skip("needs Triton")
    config = GPTConfig(vocab_size=97, width=96, layers=2, heads=3, kv_heads=1, context=32)
    ids = torch.arange(2 * 33).mul(31).remainder(97).view(2, 33).to(DEVICE)

    def losses(kernels):
        choose_kernels(kernels)
        model = GPT(config).to(DEVICE).init_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        result = []
        for _ in range(4):
            loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
        return result

    ours, want = losses("triton"), losses("torch")
    assert want[-1] < want[0] - 0.1
    assert ours == pytest.approx(want, rel=1e-5)


def test_a_constant_function_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def of_torch():
        return 1

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(of_torch))

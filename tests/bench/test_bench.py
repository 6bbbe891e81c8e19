"""Benchmarks say what is so: right before fast, against the right device, with what did not run."""

import importlib
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from helpers.bench_functions import train_together
from helpers.ranks import run_ranks
from helpers.tools import tiny_config

from hotlap.bench import cases, inference, results, training
from hotlap.bench.cases import Budget
from hotlap.bench.inference import InferenceConfig, bench_inference
from hotlap.bench.kernels import KernelsConfig, bench_kernels
from hotlap.common import machine, timing
from hotlap.common.timing import Timing, measure
from hotlap.kernels import peaks
from hotlap.model.flops import peak_flops
from hotlap.train.distributed.world import joined

CPU = torch.device("cpu")


def test_variants_take_turns_and_rotate_over_the_buffer_sets():
    calls: list[tuple[str, int]] = []
    variants = {name: (lambda i, name=name: calls.append((name, i))) for name in "ab"}
    found = measure(variants, CPU, sets=3, seconds=0.001)
    assert {i for _, i in calls} == {0, 1, 2}
    blocks = [name for name, _ in calls]
    order = [name for name, before in zip(blocks, [None, *blocks], strict=False) if name != before]
    assert len(order) >= 2 * timing.FEWEST_SAMPLES - 2 and {*order} == {"a", "b"}
    assert all(t.samples >= timing.FEWEST_SAMPLES and t.low <= t.median <= t.high for t in found.values())


def test_a_timing_is_the_median_and_its_quantiles():
    assert Timing.of([float(n) for n in range(101)]) == Timing(50.0, 10.0, 90.0, 101)


def test_unknown_devices_have_no_peak_and_measured_ceilings_are_plausible():
    assert peak_flops(CPU) is None
    found = peaks.measure_ceilings(CPU)
    assert 1e8 < found.copy < 1e13 and 1e9 < found.matmul < 1e15


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GH200 144G HBM3e", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_a_card_has_the_peak_of_its_own_name(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops


class NVMLError(Exception):
    pass


def a_busy_gpu(slowed: int = 0):
    """A pynvml whose GPU is capped, used by two others, and slowed or not."""
    return types.SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda *_: 1200, nvmlDeviceGetMaxClockInfo=lambda *_: 1980,
        nvmlDeviceGetPowerUsage=lambda _: 400_000, nvmlDeviceGetEnforcedPowerLimit=lambda _: 500_000,
        nvmlDeviceGetPowerManagementDefaultLimit=lambda _: 700_000, nvmlDeviceGetTemperature=lambda *_: 91,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [1, 2, 3],
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: slowed,
    )  # fmt: skip


def test_a_gpu_that_is_slowed_capped_or_busy_is_warned_of(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1-2"))
    for reasons in (8, 32):
        monkeypatch.setitem(sys.modules, "pynvml", a_busy_gpu(reasons))
        state, warnings = machine.device_state(gpu)
        assert state["power_w"] == 400 and state["sm_clock_mhz"] == 1200
        for said in ("throttled by heat or power (91 C)", "capped at 500 of 700 W", "2 other processes"):
            assert any(said in warning for warning in warnings)
    monkeypatch.setitem(sys.modules, "pynvml", a_busy_gpu())
    assert not any("slowed" in warning for warning in machine.device_state(gpu)[1])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is missing" in machine.device_state(gpu)[1][0]


def test_a_driver_that_says_nothing_is_a_warning(monkeypatch):
    def fails():
        raise NVMLError("library not found")

    nvml = a_busy_gpu()
    nvml.nvmlInit = fails
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state, (warning,) = machine.device_state(torch.device("cuda"))
    assert state == {} and "library not found" in warning


def test_what_a_driver_does_not_tell_is_left_open(monkeypatch):
    def fails(*_):
        raise NVMLError("not supported")

    nvml = a_busy_gpu(8)
    nvml.nvmlDeviceGetPowerManagementDefaultLimit = nvml.nvmlDeviceGetClockInfo = fails
    del nvml.nvmlDeviceGetMaxClockInfo  # an older version
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1-2"))
    state, warnings = machine.device_state(torch.device("cuda"))
    assert state["sm_clock_mhz"] is state["sm_clock_max_mhz"] is state["power_cap_default_w"] is None
    assert state["temperature_c"] == 91 and len(warnings) == 2


def test_a_cpu_that_others_use_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(machine, "busy_share", lambda: 0.5)
    machine.log_warnings(CPU)
    assert "other processes use 50% of the CPUs" in caplog.text


def test_a_case_is_begun_where_there_is_time_for_one_like_the_last(monkeypatch):
    now = 100.0
    monkeypatch.setattr(cases.time, "monotonic", lambda: now)
    budget = Budget(1)
    assert budget.fits()
    now += 25
    assert budget.fits()
    now += 20
    assert not budget.fits()  # the last took 20 s, and 15 are left
    assert all(Budget(0).fits() for _ in range(3))


def test_a_training_step_is_the_sum_of_its_parts_and_has_no_mfu_on_an_unknown_device(tmp_path):
    config = training.TrainingConfig(("tiny",), rows=1, steps=3, out=tmp_path)
    (row,) = training.bench_training(config)
    parts = sum(row[f"{phase}_ms"] for phase in training.PHASES)
    assert row["ms"] / 5 < parts < 5 * row["ms"]  # medians of few steps, each its own
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert row["data_wait_ms"] > 0 and row["mfu_nanochat"] is None
    assert row["tokens_per_second"] == pytest.approx(64 / row["ms"] * 1e3)


def test_a_step_of_several_micro_batches_counts_the_tokens_of_all(tmp_path):
    config = training.TrainingConfig(("tiny",), rows=1, micro_batches=3, steps=2, out=tmp_path)
    (row,) = training.bench_training(config)
    assert row["case"] == "tiny 3x1x64"
    assert row["tokens_per_second"] == pytest.approx(3 * 64 / row["ms"] * 1e3)


def test_the_kernels_that_are_switched_off_are_those_that_a_step_asks_for(monkeypatch, choose_kernels):
    choose_kernels("torch")  # those in C would not ask
    asked = set()
    folder = Path(training.__file__).parents[1] / "kernels"
    for name in (path.stem for path in folder.glob("*.py") if path.stem != "dispatch"):
        module = importlib.import_module(f"hotlap.kernels.{name}")
        if hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x, name=name: bool(asked.add(name)))
    shape = tiny_config(context=32)
    monkeypatch.setattr(training, "fast_dtype", lambda *_: torch.bfloat16)
    with joined() as world:
        training.measure_training(shape, 2, 1, False, world)
        assert asked == {*training.KERNELS, *training.INSIDE}
        asked.clear()
        with training.switched_off((*training.KERNELS, *training.INSIDE)):
            training.measure_training(shape, 2, 1, False, world)
        assert not asked
        training.measure_training(shape, 2, 1, False, world)
        assert asked


def test_ranks_measure_one_step_together(tmp_path):
    first, second = run_ranks(2, train_together, str(tmp_path))
    assert first[0]["case"] == second[0]["case"] == "tiny 4x64 on 2 ranks"
    assert first[0]["tokens_per_second"] == pytest.approx(2 * 4 * 64 / first[0]["ms"] * 1e3)
    assert results.load(tmp_path / "training.json")["rows"] == first  # which rank 0 alone has written


def test_half_the_rows_are_tried_where_the_memory_does_not_suffice(tmp_path, monkeypatch):
    tried = []

    def measure_training(shape, count, *_):
        tried.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("too much")
        if len(tried) > 3:
            raise RuntimeError("no kernel image")
        return {"ms": 1.0, "note": "", "mfu_nanochat": 0.205}

    monkeypatch.setattr(training, "measure_training", measure_training)
    monkeypatch.setattr(training.plots, "draw", lambda *_: False)
    rows = training.bench_training(training.TrainingConfig(("tiny", "124m"), out=tmp_path))
    assert [(row["case"], row["note"]) for row in rows[:3]] == [
        ("tiny 16x64", "out of memory; give fewer --rows"),
        ("tiny 8x64", "out of memory; give fewer --rows"),
        ("tiny 4x64", ""),
    ]
    assert rows[2]["over_nanochats_mfu"] is None  # which has no such model
    assert tried[-1] == 4 and rows[-1]["note"] == "does not run: no kernel image"  # and the others go on
    rows = training.bench_training(training.TrainingConfig(("tiny",), rows=64, out=tmp_path))
    assert len(rows) == 1  # as many as were asked for, and no fewer


def test_a_model_of_nanochats_is_set_against_what_nanochat_reaches(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure_training", lambda *_: {"ms": 1.0, "mfu_nanochat": 0.492})
    monkeypatch.setattr(training.plots, "draw", lambda *_: False)
    rows = training.bench_training(training.TrainingConfig(("d12", "d24"), out=tmp_path))
    assert [row["over_nanochats_mfu"] for row in rows] == pytest.approx([1.2, 0.984])


def test_training_waits_for_batches_of_documents_that_a_thread_reads_ahead():
    shape = tiny_config(context=32)
    with joined() as world, training.random_batches(shape, 4, 3, world) as batches:
        found = [next(batches) for _ in range(3)]
        assert "prefetch" in {thread.name for thread in threading.enumerate()}
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    for (batch,) in found:
        assert batch.inputs.shape == (4, 32) and batch.inputs.max() < shape.vocab_size
        assert batch.weight > 0.9 * 4 * 32
    inputs = torch.stack([batch.inputs for (batch,) in found])
    assert len(inputs.unique()) > 100


def test_decoding_is_measured_against_the_bytes_that_it_must_read(tmp_path):
    rows = bench_inference(InferenceConfig("tiny", batches=(1, 4), prompt=32, out=tmp_path))
    one, four = rows
    assert one["limit_ms"] < four["limit_ms"] < 4 * one["limit_ms"]  # the weights are read once
    assert all(row["share_of_bandwidth"] == pytest.approx(row["limit_ms"] / row["ms"]) for row in rows)
    assert (tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")
    for batch in (1, 4):
        assert "aten::mm" in (tmp_path / f"inference-{batch}.txt").read_text()


def test_a_batch_that_does_not_fit_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    class Greedy(inference.KVCache):
        def __init__(self, config, slots, *more):
            if slots == 2:
                raise torch.OutOfMemoryError("too much")
            super().__init__(config, slots, *more)

    monkeypatch.setattr(inference, "KVCache", Greedy)
    rows = bench_inference(InferenceConfig("tiny", batches=(1, 2, 4), prompt=8, out=tmp_path))
    assert [row.get("note") for row in rows] == [None, "out of memory; give fewer --batches", None]


def test_what_there_was_no_time_for_is_a_row(tmp_path):
    soon = {"minutes": 1e-9, "out": tmp_path}
    rows = bench_kernels(KernelsConfig(("relu2",), **soon))
    rows += training.bench_training(training.TrainingConfig(("tiny",), **soon))
    rows += bench_inference(InferenceConfig("tiny", batches=(1,), **soon))
    assert {row["note"] for row in rows} == {"skipped: no time left"} and len(rows) == 4


def test_a_provider_is_known_by_its_median_turn_or_its_failure():
    rows = [
        {"provider": who, "ms": ms}
        for who, times in (("hotlap", (3, 1, 2)), ("nanochat", (5, None, 4)))
        for ms in times
    ]
    assert inference.typical(rows) == [{"provider": "hotlap", "ms": 2}, {"provider": "nanochat", "ms": None}]

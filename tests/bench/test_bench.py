"""Benchmarks say what is so: right before fast, against the right device, with what did not run."""

import json
import sys
import threading
import types

import pytest
import torch
from tools import tiny_config

from hotlap.bench import compare, everything, kernels, peaks, results, timing, training
from hotlap.bench.inference import InferenceConfig, bench_inference
from hotlap.bench.kernels import KernelsConfig, bench_kernels
from hotlap.bench.timing import Timing, measure
from hotlap.cli import main

CPU = torch.device("cpu")
QUICK = {"rows": 64, "seconds": 0.001, "compile": False}


def test_variants_take_turns_and_rotate_over_the_buffer_sets(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0)
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
    assert peaks.paper_peaks(CPU) == {"flops": None, "bandwidth": None}
    found = peaks.measure_ceilings(CPU)
    assert 1e8 < found.copy < 1e13 and 1e9 < found.product < 1e15


@pytest.mark.parametrize(
    ("name", "bandwidth", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
        ("NVIDIA H100 PCIe", 2.0e12, 756e12),
        ("NVIDIA GH200 480GB", 4.0e12, 989e12),
        ("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12),
        ("NVIDIA L4", 0.3e12, 121e12),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("AMD Instinct MI300X", 5.3e12, 1307e12),
    ],
)
def test_a_card_has_the_peaks_of_its_own_name(name, bandwidth, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peaks.paper_peaks(torch.device("cuda")) == {"flops": flops, "bandwidth": bandwidth}


class NVMLError(Exception):
    pass


def a_busy_gpu(slowed: int = 0):
    """A pynvml whose GPU is capped, used by two others, and slowed or not."""
    return types.SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonSwThermalSlowdown=32, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
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
        state, warnings = peaks.device_state(gpu)
        assert state["power_w"] == 400 and state["sm_clock_mhz"] == 1200
        for said in ("slowed by heat or power (91 C)", "capped at 500 of 700 W", "2 other processes"):
            assert any(said in warning for warning in warnings)
    monkeypatch.setitem(sys.modules, "pynvml", a_busy_gpu())
    assert not any("slowed" in warning for warning in peaks.device_state(gpu)[1])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is missing" in peaks.device_state(gpu)[1][0]


def test_a_driver_that_says_nothing_is_a_warning(monkeypatch):
    def fails():
        raise NVMLError("library not found")

    nvml = a_busy_gpu()
    nvml.nvmlInit = fails
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state, (warning,) = peaks.device_state(torch.device("cuda"))
    assert state == {} and "library not found" in warning


def test_a_wrong_kernel_is_named_and_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hotlap.bench.operations.relu2", lambda x: x.relu().square() * 1.1)
    flags = ["--operations", "relu2", "--rows", "64", "--seconds", "0.001", "--no-compile"]
    assert main(["bench", "kernels", *flags, "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = [row for row in rows if row["provider"] == "hotlap"]
    assert ours and all(row["ms"] is None and "WRONG" in row["note"] for row in ours)
    assert any(row["provider"] == "eager" and row["ms"] > 0 for row in rows)
    assert "WRONG" in capsys.readouterr().err


def test_out_of_memory_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def greedy(x):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr("hotlap.bench.operations.relu2", greedy)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert {row["note"] for row in rows if row["provider"] == "hotlap"} == {"out of memory"}
    assert any(row["provider"] == "eager" and row["ms"] for row in rows)


def test_a_compiled_provider_is_timed_in_every_direction(tmp_path):
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **(QUICK | {"compile": True})))
    compiled = [row["case"].split()[1] for row in rows if row["provider"] == "compile" and row["ms"] > 0]
    assert compiled == ["forward", "backward", "both"] * 2


def test_what_fails_while_it_is_timed_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def fails_large(x):
        if len(x) > 32:
            raise RuntimeError("no kernel image")
        return x.relu().square()

    monkeypatch.setattr(kernels, "CHECKED_ROWS", 32)
    monkeypatch.setattr("hotlap.bench.operations.relu2", fails_large)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert {row["note"] for row in rows if row["provider"] == "hotlap"} == {"does not run: no kernel image"}
    assert any(row["provider"] == "eager" and row["ms"] for row in rows)
    monkeypatch.setattr("hotlap.bench.operations.relu2_ref", fails_large)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert len(rows) == 12 and all(
        row["ms"] is None for row in rows
    )  # no provider is left, and nothing breaks


def test_results_hold_the_device_versions_and_the_share_of_the_ceiling(tmp_path):
    rows = bench_kernels(KernelsConfig(("rms_norm",), out=tmp_path, **QUICK))
    content = results.load(tmp_path / "kernels.json")
    assert content["device"] == peaks.device_name(CPU) and content["versions"]["torch"] == torch.__version__
    assert content["rows"] == rows and content["ceilings"]["copy"] > 0
    assert {row["case"].split()[1] for row in rows} == {"forward", "backward", "both"}
    for row in rows:
        assert row["share_of_ceiling"] > 0 and row["ms_low"] <= row["ms"] <= row["ms_high"]
    assert (tmp_path / "kernels.csv").read_text().count("\n") == len(rows) + 1
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert "| rms_norm forward d12 64x768 | hotlap |" in results.write_page(tmp_path).read_text()


def write_result(path, device: str, ms: float, spread: float) -> None:
    row = {"case": "c", "provider": "p", "ms": ms, "ms_low": ms - spread, "ms_high": ms + spread}
    path.write_text(json.dumps({"device": device, "rows": [row]}))


def test_comparing_flags_what_is_slower_beyond_the_noise_and_refuses_other_devices(tmp_path, capsys):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    config = compare.CompareConfig(before, after)
    write_result(before, "card", 1.0, 0.1)
    write_result(after, "card", 1.15, 0.1)
    assert "SLOWER" not in compare.compare(config)[0]
    write_result(after, "card", 1.3, 0.1)
    assert "1.30x time  SLOWER" in compare.compare(config)[0]
    write_result(after, "card", 0.7, 0.1)
    assert "faster" in compare.compare(config)[0]
    row = {"case": "c d12", "provider": "p", "ms": None, "note": "WRONG: its output is off"}
    after.write_text(json.dumps({"device": "card", "rows": [row]}))
    assert compare.compare(config)[0].endswith("WRONG: its output is off")
    write_result(after, "other card", 1.0, 0.1)
    assert main(["bench", "compare", str(before), str(after)]) == 2
    assert "compare files of one device" in capsys.readouterr().err


def test_a_training_step_is_the_sum_of_its_parts_and_has_no_mfu_on_an_unknown_device(tmp_path):
    config = training.TrainingConfig(("tiny",), rows=1, steps=3, out=tmp_path)
    (row,) = training.bench_training(config)
    parts = sum(row[f"{phase}_ms"] for phase in training.PHASES)
    assert 0.5 * row["ms"] < parts < 1.5 * row["ms"]
    assert row["data_wait_ms"] > 0 and row["mfu_nanochat"] is None
    assert row["tokens_per_second"] == pytest.approx(256 / row["ms"] * 1e3)


def test_training_waits_for_batches_of_documents_that_a_thread_reads_ahead():
    shape = tiny_config(context=32)
    with training.random_batches(shape, 4, 3) as batches:
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


def test_what_there_was_no_time_for_is_a_row(tmp_path):
    soon = {"minutes": 1e-9, "out": tmp_path}
    rows = bench_kernels(KernelsConfig(("relu2",), **soon))
    rows += training.bench_training(training.TrainingConfig(("tiny",), **soon))
    rows += bench_inference(InferenceConfig("tiny", batches=(1,), **soon))
    assert {row["note"] for row in rows} == {"skipped: no time left"} and len(rows) == 4
    assert everything.left_out(tmp_path / "training.json") == ["tiny 16x256"]


def test_what_does_not_fit_in_the_time_is_listed_as_skipped(tmp_path, capsys):
    assert everything.bench_all(everything.AllConfig(tmp_path, minutes=0.01)) == 0
    said = capsys.readouterr().out
    assert all(f"{name:14} skipped" in said for name in ("kernels", "training", "inference"))


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["kernels", "--operations", "softmax"], 2, "unknown operation 'softmax'; known: rms_norm"),
        (["kernels", "--seconds", "0"], 2, "seconds=0.0 must be positive"),
        (["kernels", "--rows", "3000"], 2, "rows=3000 must be at most 2048 or a multiple of it"),
        (["kernels", "--minutes", "-1"], 2, "minutes=-1.0 must be 0 (no limit) or more"),
        (["training", "--steps", "0"], 2, "steps=0 must be at least 1"),
        (["training", "--models", "d13"], 2, "unknown model 'd13'; known: tiny"),
        (["inference", "--prompt", "100000"], 2, "prompt=100000 must leave room"),
        (["peers"], 2, "name a checkout by --nanogpt PATH"),
        (["peers", "--nanogpt", "nowhere"], 66, "no checkout of nanogpt at nowhere"),
        (["compare", "nowhere.json", "b.json"], 66, "no results at nowhere.json"),
        (["all", "--minutes", "0"], 2, "minutes=0.0 must be positive"),
        (["kernel"], 2, "did you mean 'kernels'?"),
    ],
)
def test_bad_input_is_one_line(flags, code, says, capsys):
    assert main(["bench", *flags]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]

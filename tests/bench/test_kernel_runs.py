"""`hotlap bench kernels`: right before fast, and a run that nothing can spoil for the operations after it."""

import json

import pytest
import torch

from hotlap.bench import accuracy, kernels, providers, results
from hotlap.bench.kernels import KernelsConfig, bench_kernels
from hotlap.bench.operations import operations
from hotlap.cli import main

CPU = torch.device("cpu")
QUICK = {"rows": 16, "seconds": 0.001, "compile": False}
RELU2 = "hotlap.bench.operations.relu2"


@pytest.fixture
def one_size(monkeypatch):
    monkeypatch.setattr("hotlap.bench.operations.WIDTHS", {"d12": 64})


def test_a_wrong_kernel_is_named_and_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RELU2, lambda x: x.relu().square() * 1.1)
    flags = ["--operations", "relu2", "--rows", "16", "--seconds", "0.001", "--no-compile"]
    assert main(["bench", "kernels", *flags, "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = [row for row in rows if row["provider"] == "hotlap"]
    assert ours and all(row["ms"] is None and "WRONG" in row["note"] for row in ours)
    assert any(row["provider"] == "eager" and row["ms"] > 0 for row in rows)
    assert "WRONG" in capsys.readouterr().err


def test_out_of_memory_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def greedy(x):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(RELU2, greedy)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert {row["note"] for row in rows if row["provider"] == "hotlap"} == {
        "out of memory; give fewer --rows"
    }
    assert any(row["provider"] == "eager" and row["ms"] for row in rows)


def test_plain_torch_is_not_timed_under_our_name(tmp_path):
    rows = bench_kernels(KernelsConfig(("relu2", "rms_norm"), out=tmp_path, **QUICK))
    ours = {row["case"].split()[0]: row for row in rows if row["provider"] == "hotlap"}
    assert ours["relu2"]["ms"] is None and "plain torch" in ours["relu2"]["note"]  # no kernel in C
    assert ours["rms_norm"]["ms"] > 0


def test_a_compiled_provider_is_timed_in_every_direction(tmp_path, one_size):
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **(QUICK | {"compile": True})))
    compiled = [row["case"].split()[1] for row in rows if row["provider"] == "compile" and row["ms"] > 0]
    assert compiled == ["forward", "backward", "both"]


def test_what_fails_while_it_is_timed_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def fails_without_gradients(x):
        if not torch.is_grad_enabled():
            raise RuntimeError("no kernel image")
        return x.relu().square()

    monkeypatch.setattr(RELU2, fails_without_gradients)
    monkeypatch.setattr(kernels, "is_plain_torch", lambda *_: False)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    ours = {row["case"].split()[1]: row.get("note") for row in rows if row["provider"] == "hotlap"}
    assert ours == {"forward": "does not run: no kernel image", "backward": None, "both": None}
    assert len(rows) == 12 and any(row["provider"] == "eager" and row["ms"] for row in rows)
    assert "RuntimeError: no kernel image" in (tmp_path / "errors.txt").read_text()


def test_a_reference_that_does_not_run_is_a_row_too(tmp_path, monkeypatch):
    def fails(x):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("hotlap.bench.operations.relu2_ref", fails)
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert {(row["provider"], row["note"]) for row in rows} == {("all", "does not run: no kernel image")}
    assert all(map(kernels.is_fault, rows))


def test_a_kernel_that_is_wrong_at_the_size_that_is_timed_alone_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(RELU2, lambda x: x.relu().square() * (1.1 if len(x) >= 16 else 1))
    rows = bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert all("WRONG" in row["note"] for row in rows if row["provider"] == "hotlap")


def test_rows_are_fewer_where_float64_does_not_fit(monkeypatch):
    def greedy(x):
        if len(x) > 2048:
            raise torch.OutOfMemoryError("too much")
        return x.relu().square()

    monkeypatch.setattr(accuracy, "CPU_ROWS", 1 << 20)
    monkeypatch.setattr("hotlap.bench.operations.WIDTHS", {"d12": 4})
    monkeypatch.setattr("hotlap.bench.operations.relu2_ref", greedy)
    right = accuracy.right_answer(next(operations(5 * 2048, CPU, torch.float32, ("relu2",))), CPU)
    assert len(right.tensors[0]) == len(right.exact[0]) == 2048
    for name in providers.WIDTHS:  # whatever its shapes are
        for operation in operations(4096, CPU, torch.float32, ("attention_inputs", "attention_lengths")):
            assert operation.with_rows(1024).name == operation.name, name


def test_what_is_under_way_is_on_disk(tmp_path, monkeypatch, one_size):
    seen = []

    def looks(x):
        rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
        seen.append((rows[-1]["case"], rows[-1]["provider"], rows[-1]["note"]))
        return x.relu().square()

    monkeypatch.setattr(RELU2, looks)
    monkeypatch.setattr(kernels, "is_plain_torch", lambda *_: False)
    bench_kernels(KernelsConfig(("relu2",), out=tmp_path, **QUICK))
    assert seen[0] == ("relu2 d12 16x256", "hotlap", kernels.UNFINISHED)
    assert seen[-1] == ("relu2 d12 16x256", "all", kernels.UNFINISHED)
    content = results.load(tmp_path / "kernels.json")
    assert content["complete"] and all(row["ms"] for row in content["rows"])


def test_a_run_goes_on_without_what_hung_in_it(tmp_path, monkeypatch, one_size):
    config = {"operations": ("rms_norm", "relu2"), "out": tmp_path, **QUICK}
    first = bench_kernels(KernelsConfig(**config | {"operations": ("rms_norm",)}))
    half = {"case": "relu2 forward d12 16x256", "provider": "eager", "ms": 1e9}
    hung = {"case": "relu2 d12 16x256", "provider": "hotlap", "ms": None, "note": kernels.UNFINISHED}
    late = {"case": "decode_attention d12", "provider": "hotlap", "ms": None, "note": "skipped: no time left"}
    results.save(tmp_path / "kernels.json", [*first, half, hung, late], CPU)

    def hangs(x):
        raise AssertionError("what hung is run again")

    monkeypatch.setattr(RELU2, hangs)
    rows = bench_kernels(KernelsConfig(resume=True, **config))
    assert rows[: len(first)] == first and rows[len(first)] == hung
    rest = rows[len(first) + 1 :]
    assert [row["case"].split()[1] for row in rest] == ["forward", "backward", "both"]
    assert all(row["provider"] == "eager" and 0 < row["ms"] < 1e9 for row in rest)


def test_a_gpu_that_is_lost_ends_the_run_with_what_is_known_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    def breaks(x):
        monkeypatch.setattr(kernels, "is_usable", lambda device: False)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(RELU2, breaks)
    flags = ["--operations", "relu2", "--rows", "16", "--seconds", "0.001", "--no-compile"]
    assert main(["bench", "kernels", *flags, "--out", str(tmp_path)]) == 74
    assert "left the GPU unusable in relu2 d12 16x3072; continue with --resume" in capsys.readouterr().err
    (row,) = results.load(tmp_path / "kernels.json")["rows"]
    assert row["provider"] == "hotlap" and "illegal memory access" in row["note"]
    assert kernels.is_fault(row)


def test_results_of_another_device_are_not_continued(tmp_path):
    content = {"kind": "kernels", "device": "another", "rows": []}
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is from another, and this is"):
        bench_kernels(KernelsConfig(("relu2",), resume=True, out=tmp_path, **QUICK))

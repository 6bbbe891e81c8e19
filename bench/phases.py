"""The phases of the suite's three calls, and how they share the GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from hotlap.bench import results
from hotlap.bench.accuracy import outputs_and_gradients
from hotlap.bench.breakdown import BreakdownConfig, break_down
from hotlap.bench.inference import InferenceConfig, bench_inference
from hotlap.bench.kernels import KernelsConfig, bench_kernels, is_fault
from hotlap.bench.operations import BUILDERS, operations
from hotlap.bench.training import TrainingConfig, bench_training
from hotlap.bench.tune import TuneConfig, tune
from hotlap.common import files
from hotlap.common.machine import device_name
from hotlap.kernels.dispatch import default_device
from hotlap.kernels.peaks import measure_ceilings
from hotlap.kernels.tiles import tuned_file

TESTS = Path(__file__).parents[1] / "tests"
SANITIZED = (  # tests of the kernels that compute their own offsets
    "kernels/test_triton_attention.py", "kernels/test_triton_rms_norm.py",
    "kernels/test_triton_cross_entropy.py", "kernels/test_triton_orthogonalize.py",
    "kernels/test_embedding.py",
)  # fmt: skip
ATTENTION = ("attention", "document_attention", "long_attention", "windowed_attention")
TUNED = (  # what was never measured first
    "orthogonalize", "decode_linear", "embedding", "qkv", "rms_norm",
    "attention_forward", "attention_backward", "linear_relu2",
)  # fmt: skip
COUNTED = ("rms_norm", "attention", "linear_relu2", "orthogonalize", "cross_entropy")  # profiled with ncu
ENDING = 8  # seconds for a command to print its findings after its time limit


class Phase(NamedTuple):
    """A part of a call. run(folder, limit, resume) returns an exit code. limit: in seconds. resume: continue
    from the results in the folder.
    """

    name: str
    seconds: float  # at most
    run: Callable[[Path, float, bool], int | None]
    place: float = 1.0  # share of the machine: phases run in parallel while their shares add up to at most 1


def ceilings(folder: Path, limit: float, resume: bool) -> None:
    """The state of the device, and its throughput in a copy and in a large matmul."""
    device = default_device()
    found = measure_ceilings(device)
    copy, matmul = found.in_tera()
    rows = [
        {"case": "copy", "provider": "torch", "ms": None, "tb_per_s": copy},
        {"case": f"matmul {found.dtype}", "provider": "torch", "ms": None, "tflops": matmul},
    ]
    results.save(folder / "ceilings.json", rows, device)
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)


def kernels(folder: Path, limit: float, resume: bool, **config: object) -> int:
    """`hotlap bench kernels`, with some of its fields set."""
    rows = bench_kernels(KernelsConfig(minutes=limit / 60, out=folder, resume=resume, **config))
    return int(any(map(is_fault, rows)))


def training(folder: Path, limit: float, resume: bool, **config: object) -> int:
    rows = bench_training(TrainingConfig(minutes=limit / 60, out=folder, **config))
    return int(any(map(is_fault, rows)))


def breakdown(folder: Path, limit: float, resume: bool, **config: object) -> None:
    break_down(BreakdownConfig(out=folder, **config))


def inference(folder: Path, limit: float, resume: bool, **config: object) -> int:
    rows = bench_inference(InferenceConfig(minutes=limit / 60, out=folder, **config))
    return int(any(map(is_fault, rows)))


def tuning(folder: Path, limit: float, resume: bool, **config: object) -> int:
    """Tune tiles, and copy the table to the folder, even if tuning was cut off."""
    try:
        return tune(TuneConfig(**config))
    finally:
        path = tuned_file(device_name(default_device()))
        if path.exists():
            shutil.copy(path, folder)


def native_tests(folder: Path, limit: float, resume: bool, workers: int = 0) -> int:
    """The tests marked `gpu`, in parallel: most of the time goes to compiling, on one core each."""
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("the native tests need pytest: pip install pytest pytest-xdist")
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", "-v"]
    workers = workers or (os.cpu_count() or 1) - 1
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "loadgroup"]
    command += [*map(str, sorted(TESTS.rglob("test_on_gpu.py"))), str(TESTS / "kernels")]
    failures = folder / "failures.txt"
    with environment(FAILURES=str(failures)):
        code = passed_on(command, limit)
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    failed = [line[:160] for line in text if line.startswith(("FAILED", "ERROR "))]
    if not failed and failures.exists():  # the tests were cut off
        lines = failures.read_text(encoding="utf-8").splitlines()
        failed = [f"FAILED {line[3:160]}" for line in lines if line.startswith("== ")]
    files.write(folder / "note.txt", "\n".join([*(line.strip("= ") for line in text[-1:]), *failed]) + "\n")
    return code


def sanitizer(folder: Path, limit: float, resume: bool) -> int:
    """Kernel tests under compute-sanitizer, which finds reads and writes out of bounds."""
    if not shutil.which("compute-sanitizer"):
        raise FileNotFoundError("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "two_runs_agree"]
    with environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"):
        return passed_on([*command, *(str(TESTS / name) for name in SANITIZED)], limit)


def counters(folder: Path, limit: float, resume: bool) -> int:
    """Our kernels under ncu: memory and tensor-core utilisation, and stalls."""
    if not shutil.which("ncu"):
        raise FileNotFoundError("ncu is not on the PATH; it comes with Nsight Compute")
    command = ["ncu", "--clock-control", "none", "--set", "detailed", "-k", "regex:^_", "-c", "12", "--csv"]
    command += ["--page", "details", "--log-file", str(folder / "ncu.csv"), sys.executable, "-c"]
    code = f"from hotlap.bench.phases import call_kernels; call_kernels({COUNTED!r})"
    return passed_on([*command, code], limit)


def call_kernels(names: tuple[str, ...]) -> None:
    """Forward and backward pass of each operation, once, to be profiled by ncu."""
    for operation in operations(16384, default_device(), torch.bfloat16, names, ("d24",)):
        outputs_and_gradients(operation, operation.providers["hotlap"], operation.tensors())


def passed_on(command: list[str], seconds: float) -> int:
    """The exit code of a command that prints to our log; after `seconds` it is interrupted, then killed."""
    sys.stdout.flush()
    process = subprocess.Popen(command, cwd=TESTS.parent)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    process.send_signal(2)  # SIGINT: pytest prints its findings
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(ENDING) or 1
    process.kill()
    return 1


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def smoke(name: str) -> Phase:
    """A quick check that an operation runs and is right at a training size."""
    run = partial(kernels, operations=(name,), rows=4096, sizes=("d24",), seconds=0.05, compile=False)
    return Phase(f"smoke-{name}", 90, run, place=0.12)


LOOK = (
    (Phase("ceilings", 30, ceilings),),
    (
        Phase("warm-d24", 110, partial(training, models=("d24",), rows=8, steps=1), place=0.12),
        *map(smoke, BUILDERS),
        Phase("sanitizer", 110, sanitizer, place=0.12),
    ),
    (Phase("breakdown-d24", 60, partial(breakdown, model="d24", rows=8)),),
    (Phase("attention", 60, partial(kernels, operations=ATTENTION, sizes=("d24",), seconds=0.1)),),
)
CHECK = (
    (Phase("native-tests", 170, native_tests),),
    (Phase("tune", 75, partial(tuning, kernel=TUNED, seconds=0.04)),),
    (Phase("kernels", 90, partial(kernels, seconds=0.08, sizes=("d24",))),),
)
FIGURES = (
    (Phase("training", 120, partial(training, models=("d24", "d12"), micro_batches=4, steps=5)),),
    (Phase("training-fp8", 60, partial(training, models=("d24",), micro_batches=4, steps=5, fp8=True)),),
    (Phase("inference", 45, partial(inference, batches=(1, 8, 32, 128))),),
    (Phase("counters", 45, counters),),
)
CALLS = {"look": LOOK, "check": CHECK, "figures": FIGURES}
MINUTES = {"look": 3.5, "check": 5.5, "figures": 4.0}

"""`hotlap bench all`: what matters most on this device first, in the time given; what did not fit is listed.

Each stage has a process of its own, which is ended where it hangs, and writes what it has measured meanwhile.
`python -m hotlap.bench.everything --minutes 9 --out DIR` needs no more than torch, Triton and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.bench import results
from hotlap.bench.inference import InferenceConfig, bench_inference
from hotlap.bench.kernels import KernelsConfig, bench_kernels, is_fault
from hotlap.bench.timing import NO_TIME
from hotlap.bench.training import TrainingConfig, bench_training
from hotlap.kernels.dispatch import default_device
from hotlap.model.errors import guarded
from hotlap.train.log import log, set_up_logging

SHORTEST_STAGE = 20  # seconds that are worth starting a stage for
GRACE = 30  # seconds that a stage may take beyond its time to end what it has begun
TESTS_UNTIL = 0.25  # share of the time


@dataclass(frozen=True)
class AllConfig:
    """Test the kernels natively, then measure kernels, training and inference, in a given time."""

    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""
    minutes: float = 9.0
    """Time for everything."""


def kernels(minutes: float, out: Path, resume: bool) -> int:
    rows = bench_kernels(KernelsConfig(minutes=minutes, out=out, resume=resume))
    return int(any(map(is_fault, rows)))


def training(minutes: float, out: Path, resume: bool) -> int:
    rows = bench_training(TrainingConfig(minutes=minutes, out=out, without=True))
    return int(any(map(is_fault, rows)))


def inference(minutes: float, out: Path, resume: bool) -> int:
    rows = bench_inference(InferenceConfig(minutes=minutes, out=out))
    return int(any(map(is_fault, rows)))


# Until which share of the time each may start cases; kernels then do what they had no time for.
STAGES = ((kernels, 0.6), (training, 0.88), (inference, 1.0), (kernels, 1.0))


def bench_all(config: AllConfig) -> int:
    """Run the stages until the time is over and say what became of each; 1 where one failed, else 0."""
    if not 0 < config.minutes < math.inf:
        raise ValueError(f"minutes={config.minutes} must be positive")
    out = config.out or results.device_folder(default_device())
    results.check_folder(out)
    began, whole = time.monotonic(), 60 * config.minutes
    outcome: dict[str, str] = {}
    tests = Path(__file__).parents[1] / "tests"
    if torch.cuda.is_available() and tests.is_dir():
        outcome["native tests"] = native_tests(tests, out / "native-tests.txt", began + TESTS_UNTIL * whole)
    paths = {stage.__name__: results.set_aside(out / f"{stage.__name__}.json") for stage, _ in STAGES}
    for stage, share in STAGES:
        name = stage.__name__
        again = name in outcome
        if again and not is_late(paths[name]):
            continue
        verdict = run_stage(stage, paths[name], began + share * whole, began + whole, again)
        if not again or verdict != NO_TIME:
            outcome[name] = f"{outcome[name]}, then {verdict}" if again else verdict
        if config.out:
            results.write_page(config.out)
    print("\n".join(f"{name:13} {text}" for name, text in outcome.items()))
    for name, path in paths.items():
        for line in left_out(path):
            print(f"{name:13} {line}")
    return int(any("FAILED" in text for text in outcome.values()))


def native_tests(tests: Path, report: Path, end: float) -> str:
    """Run the tests that a GPU has to pass until the time `end`, and say what came out; all of it goes to a
    file.
    """
    if importlib.util.find_spec("pytest") is None:
        return "skipped: pytest is missing"
    if (left := end - time.monotonic()) < SHORTEST_STAGE:
        return NO_TIME
    log.info("== native tests, at most %.0f s, to %s", left, report)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):  # most of the time compilers take, on one core each
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    command += [*map(str, sorted(tests.rglob("test_on_gpu.py"))), str(tests / "kernels")]
    with open(report, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=tests.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = wait(process, left)
    lines = report.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            log.error("%s", line)
    last = lines[-1].strip("= ")
    if code is None:
        return f"FAILED: hung, after: {last}"
    cut = "cut off: " if time.monotonic() > end else ""
    passed = code == 0 or (cut and not any(line.startswith(("FAILED", "ERROR")) for line in lines))
    return f"{cut}{last}" if passed else f"FAILED: {cut}{last}"


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code of a process that is asked to end after so many seconds; None where it was killed."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        process.send_signal(signal.SIGINT)  # pytest then says what it has found
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE / 2)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers


def run_stage(
    stage: Callable[[float, Path, bool], int], path: Path, soft: float, end: float, resume: bool = False
) -> str:
    """Run a stage until the time `soft`, or a little longer for what is under way, and say what became of it.

    path: of its results, which it continues to resume. Where it ends before they are complete, but has come
    further, it does the rest.
    """
    name, began, verdict = stage.__name__, time.monotonic(), NO_TIME
    before = len(results.load(path)["rows"]) if resume else -1
    while (left := soft - time.monotonic()) >= SHORTEST_STAGE:
        log.info("== %s, at most %.0f s", name, left)
        arguments = left / 60, path.parent, resume
        code = run_apart(stage, arguments, min(end, soft + GRACE) - time.monotonic())
        took = f"{time.monotonic() - began:.0f} s"
        if code is None:
            return f"cut off after {took}; what it had measured is written"
        verdict = f"done in {took}" if code == 0 else f"FAILED with exit code {code} after {took}"
        content = results.load(path) if path.exists() else {"rows": ()}
        if stage is not kernels or content.get("complete") or len(content["rows"]) <= before:
            break
        before, resume = len(content["rows"]), True
    return verdict


def is_late(path: Path) -> bool:
    """Whether there was no time for some of the kernels."""
    if not path.exists():
        return False
    content = results.load(path)
    return not content.get("complete") or any(row.get("note") == NO_TIME for row in content["rows"])


def run_apart(stage: Callable[[float, Path, bool], int], arguments: tuple, seconds: float) -> int | None:
    """The exit code of a stage in a process of its own, or None where it had to be killed."""
    process = multiprocessing.get_context("spawn").Process(target=_apart, args=(stage, arguments))
    process.start()
    try:
        process.join(seconds)
        return process.exitcode
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _apart(stage: Callable[[float, Path, bool], int], arguments: tuple) -> None:
    set_up_logging()

    def run() -> int:
        try:
            return stage(*arguments)
        except Exception:
            results.write_traceback(arguments[1], stage.__name__)
            raise

    sys.exit(guarded(run, debug=False))


def left_out(path: Path) -> list[str]:
    """A line for each case without a measurement, with the reason, and one for all that came too late."""
    rows = results.load(path)["rows"] if path.exists() else []
    lines = [f"{row['case']} by {row['provider']}: {row['note']}" for row in rows if row.get("note")]
    late = [row["case"] for row in rows if row.get("note") == NO_TIME]
    lines = [line for line in lines if not line.endswith(NO_TIME)]
    return lines + ([f"{NO_TIME}: {', '.join(late)}"] if late else [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hotlap.bench.everything", description=AllConfig.__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results; by default bench/results/DEVICE")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    given = parser.parse_args()
    set_up_logging()
    return guarded(lambda: bench_all(AllConfig(given.out, given.minutes)), debug=False)


if __name__ == "__main__":
    raise SystemExit(main())

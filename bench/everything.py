"""`hotlap bench all`: what matters most on this device first, in the time given; what did not fit is
listed.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.bench import results
from hotlap.bench.timing import NO_TIME, deadline
from hotlap.kernels.dispatch import default_device
from hotlap.train.log import log

SHORTEST_STAGE = 20  # seconds that are worth starting a stage for
STAGES = {
    "kernels": 0.5,
    "training": 0.7,
    "inference": 1.0,
}  # after which share of the time to start nothing new
TESTS_SHARE = 0.3  # of the time, after which the native tests are cut off


@dataclass(frozen=True)
class AllConfig:
    """Test the kernels natively, then measure kernels, training and inference, in a given time."""

    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""
    minutes: float = 9.0
    """Time for everything."""


def bench_all(config: AllConfig) -> int:
    """Run the stages until the time is over and say what became of each; 1 where one failed, else 0."""
    if not 0 < config.minutes < math.inf:
        raise ValueError(f"minutes={config.minutes} must be positive")
    out = config.out or results.device_folder(default_device())
    out.mkdir(parents=True, exist_ok=True)
    end = deadline(config.minutes)
    outcome: dict[str, str] = {}
    tests = Path(__file__).parents[1] / "tests"
    if torch.cuda.is_available() and tests.is_dir():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
        outcome["native tests"] = run("native tests", command, end, TESTS_SHARE)
    for name, share in STAGES.items():
        minutes = share * (end - time.monotonic()) / 60
        command = [sys.executable, "-m", "hotlap.cli", "bench", name, "--out", str(out)]
        outcome[name] = run(name, [*command, "--minutes", f"{minutes:.2f}"], end, 1.0)
        if outcome[name].startswith("done") and (cases := left_out(out / f"{name}.json")):
            outcome[name] += f"; {NO_TIME}: {', '.join(cases)}"
    if config.out:
        results.write_page(config.out)
    print("\n".join(f"{name:14} {text}" for name, text in outcome.items()))
    return int(any("FAILED" in text for text in outcome.values()))


def run(name: str, command: list[str], end: float, share: float) -> str:
    """Run a command for at most a share of the time that is left, and say what became of it."""
    left = end - time.monotonic()
    if left < SHORTEST_STAGE:
        return NO_TIME
    log.info("== %s, at most %.0f s", name, share * left)
    began = time.monotonic()
    try:
        code = subprocess.run(command, timeout=share * left).returncode
    except subprocess.TimeoutExpired:
        return f"cut off after {share * left:.0f} s; what it had measured is written"
    verdict = "done" if code == 0 else f"FAILED with exit code {code}"
    return f"{verdict} in {time.monotonic() - began:.0f} s"


def left_out(path: Path) -> list[str]:
    """The cases that a stage had no time for."""
    return [row["case"] for row in results.load(path)["rows"] if row.get("note") == NO_TIME]

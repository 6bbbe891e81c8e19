"""`hotlap bench all`: what matters most on this device first, in the time given; what did not fit is
listed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.bench import results
from hotlap.bench.results import write_page
from hotlap.kernels.dispatch import default_device
from hotlap.train.log import log

SHORTEST_STAGE = 20  # seconds that are worth starting a stage for


@dataclass(frozen=True)
class AllConfig:
    """Test the kernels natively, then measure kernels, training and inference, in a given time."""

    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""
    minutes: float = 9.0
    """Time for everything."""


def stages(out: Path) -> list[tuple[str, list[str]]]:
    """Commands, the most important first."""
    hotlap = [sys.executable, "-m", "hotlap.cli", "bench"]
    tests = Path(__file__).parents[1] / "tests" / "kernels"
    found = [(name, [*hotlap, name, "--out", str(out)]) for name in ("kernels", "training", "inference")]
    if torch.cuda.is_available() and tests.is_dir():
        found.insert(0, ("native tests", [sys.executable, "-m", "pytest", "-q", str(tests)]))
    return found


def bench_all(config: AllConfig) -> int:
    """Run the stages until the time is over, and return 1 where one failed, else 0."""
    if not config.minutes > 0:
        raise ValueError(f"minutes={config.minutes} must be positive")
    out = config.out or results.device_folder(default_device())
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * config.minutes
    outcome: dict[str, str] = {}
    for name, command in stages(out):
        left = deadline - time.monotonic()
        if left < SHORTEST_STAGE:
            outcome[name] = "skipped: no time left"
            continue
        log.info("== %s, at most %.0f s", name, left)
        began = time.monotonic()
        try:
            code = subprocess.run(command, timeout=left).returncode
            verdict = "done" if code == 0 else f"FAILED with exit code {code}"
            outcome[name] = f"{verdict} in {time.monotonic() - began:.0f} s"
        except subprocess.TimeoutExpired:
            outcome[name] = "cut off: no time left"
    write_page(out)
    print("\n".join(f"{name:14} {text}" for name, text in outcome.items()))
    return int(any("FAILED" in text for text in outcome.values()))

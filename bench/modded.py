"""modded-nanogpt's unmodified training scripts on one GPU, in turns with our 124m.

Each script runs in its own process with the variables that torchrun would set, and is killed after the
measured steps. Scripts write logs to the current folder, so they run in a temporary one with a link to the
data. Times are those that the script prints.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hotlap.bench import results
from hotlap.common.log import log
from hotlap.common.timing import Timing, synchronize
from hotlap.model.config import GPTConfig

PLAIN = "records/track_3_optimization/train_gpt_simple.py"
SCRIPTS = {
    "modded-nanogpt-plain": PLAIN,  # the shape of our 124m, in plain torch
    "modded-nanogpt": "train_gpt.py",  # the record: its own model, FlashAttention 3, fp8
}
DATA = "fineweb10B"
STEP = re.compile(r"step:\d+/\d+ train_time:([\d.]+)(ms|s) step_avg:")
BATCH = re.compile(r"\bbatch_size ?= ?(\d[\d *]*)")  # the first match is the batch of the first steps
UNTIMED, BLOCK, BLOCKS = 10, 10, 5  # steps; blocks, as single steps vary and are printed before they end
OUR_UNTIMED, OUR_STEPS = 2, 10


def runnable(path: Path, device: torch.device) -> dict[str, Path]:
    """The scripts of a checkout that this device can run. ValueError if there are none."""
    if not (path / "train_gpt.py").is_file():
        raise FileNotFoundError(f"no {path / 'train_gpt.py'}; is that a checkout of modded-nanogpt?")
    if device.type != "cuda":
        raise ValueError(
            f"--modded runs {PLAIN} and train_gpt.py of {path}, which need an NVIDIA GPU (and train_gpt.py a "
            "Hopper GPU and the `kernels` package); this machine has none"
        )
    train, held_out = (list((data_folder(path) / DATA).glob(f"fineweb_{s}_*.bin")) for s in ("train", "val"))
    if len(train) < 2 or not held_out:
        raise ValueError(
            f"{data_folder(path) / DATA} holds {len(train)} shards fineweb_train_*.bin and {len(held_out)} "
            "fineweb_val_*.bin; modded-nanogpt needs two and one: python data/cached_fineweb10B.py 2"
        )
    scripts = {name: path / script for name, script in SCRIPTS.items() if (path / script).is_file()}
    if torch.cuda.get_device_capability(device) != (9, 0):
        log.warning("skipping train_gpt.py: it needs a Hopper GPU (compute capability 9.0)")
        del scripts["modded-nanogpt"]
    if not scripts:
        raise ValueError(f"train_gpt.py needs a Hopper GPU, and {path} has no {PLAIN}; update the checkout")
    return scripts


def data_folder(path: Path) -> Path:
    """The data folder of a checkout; like its scripts, this reads DATA_PATH."""
    return Path(os.environ.get("DATA_PATH", path)) / "data"


def bench_script(
    name: str, script: Path, data: Path, shape: GPTConfig, our_step: Callable, device: torch.device
) -> list[dict]:
    """Two rows: the script's steps, and ours, timed before and after it on batches of as many tokens. If the
    script fails, its row has its last line of output.
    """
    batch = batch_tokens(script)
    rows = batch // shape.context
    tokens = torch.randint(shape.vocab_size, (rows, shape.context + 1), device=device)
    ours = our_seconds(our_step, tokens, device)
    log.info("%s: running; the first time, it compiles for minutes", script)
    note, theirs = "", []
    try:
        theirs = their_seconds(script, data)
    except RuntimeError as error:
        note = f"does not run: {error}"
    ours += our_seconds(our_step, tokens, device)
    timings = {"hotlap": Timing.of(ours)} | ({name: Timing.of(theirs)} if theirs else {})
    found = []
    for who in ("hotlap", name):
        row = {"case": f"step 124m {batch} tokens beside {name}", "provider": who}
        if timing := timings.get(who):
            row |= {
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "tokens_per_second": batch / timing.median,
                "times_as_fast_as_peer": timings[name].median / timing.median if theirs else None,
            }
        else:
            row |= {"ms": None, "note": note}
        log.info("%s", results.as_line(row))
        found.append(row)
    return found


def batch_tokens(script: Path) -> int:
    """Tokens per step in the script's first steps."""
    match = BATCH.search(script.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{script} has no line `batch_size = ...`; use a newer checkout of modded-nanogpt")
    return math.prod(int(factor) for factor in match[1].split("*"))


def our_seconds(step: Callable, tokens: torch.Tensor, device: torch.device) -> list[float]:
    """Seconds of each of our steps. Frees cached GPU memory afterwards."""
    seconds = []
    for _ in range(OUR_UNTIMED + OUR_STEPS):
        synchronize(device)
        began = time.perf_counter()
        step(tokens)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds[OUR_UNTIMED:]


def their_seconds(script: Path, data: Path) -> list[float]:
    """Seconds per step of each block of the script's steps. RuntimeError if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_gpu = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one_gpu |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quiet = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "DATA_PATH": "."}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(data.resolve())
        process = subprocess.Popen(
            [sys.executable, str(script.resolve())],
            cwd=folder, env=os.environ | one_gpu | quiet, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        with process:
            try:
                return block_seconds(process.stdout)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # and the compiler's workers


def block_seconds(lines: Iterable[str]) -> list[float]:
    """Seconds per step of each block, from a script's output. RuntimeError with its last line if it ends too
    early.
    """
    times: list[float] = []  # since the start, after each step
    last: collections.deque[str] = collections.deque(maxlen=1)
    for line in lines:
        if match := STEP.search(line):
            times.append(float(match[1]) * (1e-3 if match[2] == "ms" else 1))
        elif line.strip():
            last.append(line.strip())
        if len(times) == UNTIMED + BLOCK * BLOCKS:
            marks = times[UNTIMED - 1 :: BLOCK]
            return [(after - before) / BLOCK for before, after in itertools.pairwise(marks)]
    raise RuntimeError(f"it ended after {len(times)} steps: {' '.join(last)[:200]}")

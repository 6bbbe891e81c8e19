"""Runs functions on several ranks, forked from a server that has already imported torch, which is fast."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from hotlap.train.distributed.world import joined

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hotlap.train.pretrain", "hotlap.train.sft", "helpers.ranks",
        # what a run imports to make its optimizer and to draw its curves: most of a small run's time
        "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg",
    ]
)  # fmt: skip

GRACE = 8.0  # seconds for all ranks to end after one has failed


class Failed(Exception):
    """Raised if ranks fail. `texts`: their tracebacks by rank; `seconds`: until all had ended."""

    def __init__(self, texts: dict[int, str], seconds: float):
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(texts.items())))
        self.texts, self.seconds = texts, seconds


def work(function: Callable, rank: int, size: int, port: int, env: dict, arguments: tuple, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        | env
    )
    if "STDERR" in env:  # the server has the stderr of whichever test came first
        os.dup2(os.open(env["STDERR"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        results.put((rank, True, function(*arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(
    size: int, function: Callable, *arguments, env: dict | None = None, timeout: float = 60
) -> list:
    """Return what function(*arguments) returned on each of `size` ranks. Raises Failed if one failed.

    The function must be importable by name, so it is defined in a module without tests.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # like torchrun's agent
    results, began = CONTEXT.Queue(), time.monotonic()
    good_until = began
    ranks = [
        CONTEXT.Process(target=work, args=(function, rank, size, store.port, env or {}, arguments, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, object] = {}
    failed: dict[int, str] = {}
    try:
        while len(found) + len(failed) < size:
            try:
                rank, good, value = results.get(timeout=0.05)
                (found if good else failed)[rank] = value
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if not p.is_alive() and p.exitcode and p.exitcode < 0]
                failed |= {r: f"killed by signal {-ranks[r].exitcode}" for r in dead if r not in failed}
                if not failed:
                    good_until = time.monotonic()
                running = [r for r in range(size) if r not in found and r not in failed]
                late = time.monotonic() - began > timeout or time.monotonic() - good_until > GRACE
                if late or (failed and all(is_stopped(ranks[r]) for r in running)):
                    failed |= dict.fromkeys(running, "did not end")
        seconds = time.monotonic() - began
    finally:
        for process in ranks:
            if process.is_alive() and failed:
                process.kill()
            process.join()
    if failed:
        raise Failed(failed, seconds)
    return [found[rank] for rank in range(size)]


def is_stopped(process) -> bool:
    """By SIGSTOP, after which it does not end."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2]
    except OSError:  # it has ended
        return False
    return state.startswith("T")


def in_world(function: Callable, *arguments, timeout: float = 20):
    """Join the other ranks and return function(world, *arguments)."""
    with joined(timeout) as world:
        return function(world, *arguments)

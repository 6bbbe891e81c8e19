"""Choices that depend on the CPU: measured when they are first needed, and kept in the cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hotlap.common import files
from hotlap.common.cpu import LIMITS
from hotlap.common.log import log
from hotlap.kernels.cpu.library import cpu_identity

RUNS = 5  # of each candidate, of which the fastest counts
HOPELESS = 2  # times as slow as the best so far: one run is enough


@functools.cache
def _answers_path() -> Path:
    limits = [os.environ.get(name) for name in LIMITS]
    identity = repr((cpu_identity(), torch.__version__, limits))
    return files.cache_folder() / "cpu" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def fastest(question: str, candidates: dict[str, Callable[[], Callable[[], object]]]) -> str:
    """The candidate that takes the least time on one core, as measured now or earlier on this CPU.

    question: names the case in the file of answers, and in the log. candidates: each makes its inputs, and
    returns the function to measure. They do not change torch's random state, which would make a run depend on
    whether an answer was known.
    """
    path = _answers_path()
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        answers = {}
    answers = answers if isinstance(answers, dict) else {}
    if answers.get(question) in list(candidates):
        return answers[question]
    with ThreadPoolExecutor(1) as apart:  # where nothing traces, records or casts what runs, as it may here
        seconds = apart.submit(_measure, candidates, torch.get_num_threads()).result()
    best = min(seconds, key=seconds.__getitem__)
    rest = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms" for name in seconds)
    log.info("%s: %s (measured on this CPU: %s)", question, best, rest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_object(path, {**answers, question: best})
    except OSError as error:
        log.info("cannot keep this answer: %s", error)
    return best


def _measure(candidates: dict[str, Callable[[], Callable[[], object]]], threads: int) -> dict[str, float]:
    """Seconds of each candidate on one thread. threads: torch's number of them, which it has afterwards."""
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other are what would be measured
    try:
        seconds: dict[str, float] = {}
        for name, prepare in candidates.items():
            seconds[name] = _seconds(prepare(), HOPELESS * min(seconds.values(), default=float("inf")))
        return seconds
    finally:
        torch.set_num_threads(threads)


def _seconds(run: Callable[[], object], enough: float) -> float:
    """Processor time of the fastest run: other processes change it less than time on the clock.

    enough: a run that takes longer is the last one.
    """
    run()  # warms caches
    fastest_run = float("inf")
    for _ in range(RUNS):
        began = time.thread_time()
        run()
        fastest_run = min(fastest_run, time.thread_time() - began)
        if fastest_run > enough:
            break
    return fastest_run

"""`hotlap bench tune`: measure the tiles of every table on the GPU at hand, and write down the fastest.

Each case runs in bfloat16 at a size that does not fit the caches; then, with the tiles found, the Gram form
of the orthogonalisation, and each backend of attention. What was measured is used from then on; the file is
in the user's cache, and removing it undoes this.
"""
# B batch, T time, H heads, C head dim

from __future__ import annotations

import importlib
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hotlap.bench.static import MODULES
from hotlap.kernels.attention import attention, case_key
from hotlap.kernels.dispatch import INTERPRETED, device_facts, kernel_choice, triton
from hotlap.kernels.orthogonalize import GRAM_CHOICE, POLAR_EXPRESS, _steps
from hotlap.kernels.tiles import (
    Case,
    Tile,
    fitting_tiles,
    pick_tile,
    tile_key,
    tuned_choices,
    tuned_tiles,
    write_tuned,
)

log = logging.getLogger("hotlap")

GRAM_ASPECTS = (2.0, 3.0, 4.0)  # below, the Gram form has no fewer FLOPs
MARGIN = 0.98  # of the default's time: what a candidate has to beat, for less is noise


@dataclass(frozen=True)
class TuneConfig:
    """Measure the tiles of every kernel on this GPU, and write down the fastest for later runs."""

    kernel: tuple[str, ...] = (*MODULES, "attention")
    """Files of kernels, such as rms_norm; attention: its backends."""
    rounds: int = 5
    """Measurements of each tile, which take turns."""


def measure(case: Case, rounds: int, device: torch.device) -> dict[int, float]:
    """Milliseconds of each fitting tile, by its place: the median over rounds in which tiles take turns."""
    facts = device_facts(device)
    tiles, key = fitting_tiles(case.table, case.size, facts), tile_key(case.table, case.size)
    chosen, launch = tuned_tiles(facts.name), case.run(device)
    before, times = chosen.get(key), {i: [] for i in range(len(tiles))}
    try:
        for _ in range(rounds):
            for i, tile in enumerate(tiles):
                chosen[key] = tile
                pick_tile.cache_clear()
                times[i].append(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))
    finally:
        chosen.pop(key)
        if before is not None:
            chosen[key] = before
        pick_tile.cache_clear()
    return {i: statistics.median(values) for i, values in times.items()}


def fastest(tiles: list[Tile], milliseconds: dict[int, float]) -> Tile:
    """The fastest tile, or the default where none is clearly faster."""
    best = min(milliseconds, key=milliseconds.__getitem__)
    return tiles[best] if milliseconds[best] < MARGIN * milliseconds[0] else tiles[0]


def measure_gram(rounds: int, device: torch.device) -> Iterator[tuple[float, tuple[float, float]]]:
    """For each aspect ratio the milliseconds of an orthogonalisation with the Gram form and without: medians
    over rounds in which they take turns, of 12 matrices with a shorter side of 1536.
    """
    for aspect in GRAM_ASPECTS:
        x = torch.randn(12, 1536, round(1536 * aspect), device=device, dtype=torch.float16)
        x /= aspect**0.5 * 1536**0.5  # so that a norm is 1536^0.5
        runs = [partial(_steps, x, POLAR_EXPRESS, 1536**0.5, limit) for limit in (1.0, math.inf)]
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for run, each in zip(runs, times, strict=True):
                each.append(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
        yield aspect, (statistics.median(times[0]), statistics.median(times[1]))


def from_where(times: dict[float, tuple[float, float]]) -> float:
    """The least aspect ratio from which on the first time is the smaller one, of those tried; or inf."""
    least = math.inf
    for aspect in sorted(times, reverse=True):
        gram, plain = times[aspect]
        if gram >= MARGIN * plain:
            break
        least = aspect
    return least


def measure_backends(rounds: int, device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """For each head size, length and window its key, and the milliseconds of each backend that can do it.

    Forward and backward of 16k tokens at a width of 2048; medians over rounds in which backends take turns.
    """
    for C, T, window in itertools.product((64, 128), (1024, 2048, 4096, 8192, 16384), (None, 512, 1024)):
        if window and window >= T:
            continue
        shape = (3, 16384 // T, T, 2048 // C, C)
        inputs = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
        dy = torch.randn(shape[1:], device=device, dtype=torch.bfloat16)
        runs: dict[str, Callable] = {}
        for backend in ("triton", *(("flash", "cudnn") if window is None else ()), "flash-attn"):
            run = partial(step, inputs, dy, window, backend)
            try:
                run()
            except (ValueError, RuntimeError, AssertionError) as error:  # not installed, or not for this GPU
                log.info("attention: no %s here: %s", backend, error)
            else:
                runs[backend] = run
        times: dict[str, list[float]] = {backend: [] for backend in runs}
        for _ in range(rounds):
            for backend, run in runs.items():
                times[backend].append(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
        yield case_key(C, T, window or 0), {name: statistics.median(each) for name, each in times.items()}


def step(inputs: torch.Tensor, dy: torch.Tensor, window: int | None, backend: str) -> None:
    y = attention(*inputs, window, backend=backend)
    torch.autograd.grad(y, inputs, dy)


def main(config: TuneConfig) -> int:
    """Measure, print a line a case, and write the file."""
    if unknown := [name for name in config.kernel if name not in (*MODULES, "attention")]:
        raise ValueError(f"--kernel {unknown[0]} is unknown; known: {', '.join(MODULES)}, attention")
    if config.rounds < 1:
        raise ValueError(f"rounds={config.rounds} must be at least 1")
    if not torch.cuda.is_available():
        raise ValueError("hotlap bench tune measures on a GPU, and this machine has none")
    if INTERPRETED or kernel_choice("cuda") != "triton":
        raise ValueError("hotlap bench tune is for Triton; unset HOTLAP_KERNELS and TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = device_facts(device)
    results = dict(tuned_tiles(facts.name))
    seen = set()
    for name in MODULES:
        if name not in config.kernel:
            continue
        for case in importlib.import_module(f"hotlap.kernels.{name}").cases(torch.bfloat16):
            key, tiles = tile_key(case.table, case.size), fitting_tiles(case.table, case.size, facts)
            if key in seen:  # kernels that share a table are tuned by the first
                continue
            seen.add(key)
            times = measure(case, config.rounds, device)
            results[key] = tile = fastest(tiles, times)
            sizes = " ".join(f"{block}={size}" for block, size in tile.blocks.items())
            form = f" {tile.kernel.strip('_')}" if tile.kernel else ""
            took = f"{times[tiles.index(tile)]:.3f} ms, default {times[0]:.3f} ms"
            print(f"{key:40} {sizes} warps={tile.warps} stages={tile.stages}{form}: {took}")
    choices = dict(tuned_choices(facts.name))
    write_tuned(facts.name, results, choices)
    if "orthogonalize" in config.kernel:
        times = dict(measure_gram(config.rounds, device))
        choices[GRAM_CHOICE] = str(from_where(times))
        shown = (f"{aspect}: {gram:.3f} and {plain:.3f} ms" for aspect, (gram, plain) in times.items())
        print(f"{GRAM_CHOICE:40} {choices[GRAM_CHOICE]}; with it and without, {', '.join(shown)}")
    for key, times in measure_backends(config.rounds, device) if "attention" in config.kernel else ():
        choices[key] = best = min(times, key=times.__getitem__)
        print(f"attention {key:30} {best}: {', '.join(f'{name} {ms:.3f} ms' for name, ms in times.items())}")
    print(write_tuned(facts.name, results, choices))
    return 0

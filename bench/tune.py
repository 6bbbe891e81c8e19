"""`hotlap bench tune`: find the fastest tile of every kernel on this GPU, and use it from then on.

Each case runs in bfloat16 at a size that does not fit in the caches. Then, with those tiles,
orthogonalisation is timed with and without its Gram form, and attention with each backend. All are timed as
CUDA graphs, because launching a small kernel takes longer than running it. Compiling takes the most time, so
it is done first, on all cores. The results are a file in the user's cache; delete it to undo the tuning.
"""
# B batch, T time, H heads, C head dim

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from hotlap.bench.config import TuneConfig
from hotlap.bench.static import MODULES
from hotlap.common import timing
from hotlap.common.log import log
from hotlap.common.timing import Call
from hotlap.kernels.attention import attention, case_key
from hotlap.kernels.dispatch import INTERPRETED, device_facts, kernel_choice, triton
from hotlap.kernels.orthogonalize import GRAM_CHOICE, POLAR_EXPRESS, _steps
from hotlap.kernels.tiles import (
    Case,
    Tile,
    fitting_tiles,
    pick_tile,
    read_tuned,
    tile_key,
    tuned,
    tuned_file,
    write_tuned,
)

GRAM_ASPECTS = (2.0, 3.0, 4.0)  # below these, the Gram form saves no FLOPs
MARGIN = 0.98  # a candidate must beat this share of the default's time; less is noise


def tune(config: TuneConfig) -> int:
    """Measure, print a line per case, and write the file."""
    kernels = config.kernel or (*MODULES, "attention")
    if unknown := [name for name in kernels if name not in (*MODULES, "attention")]:
        raise ValueError(f"--kernel {unknown[0]} is unknown; known: {', '.join(MODULES)}, attention")
    config.validate()
    if not torch.cuda.is_available():
        raise ValueError("hotlap bench tune needs a GPU, and this machine has none")
    if INTERPRETED or kernel_choice("cuda") != "triton":
        raise ValueError("hotlap bench tune needs Triton; unset HOTLAP_KERNELS and TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = device_facts(device)
    results, choices, _ = read_tuned(tuned_file(facts.name))
    cases: dict[str, tuple[Case, tuple[str, int]]] = {}
    for name in (name for name in kernels if name in MODULES):
        module = importlib.import_module(f"hotlap.kernels.{name}")
        for place, case in enumerate(module.cases(torch.bfloat16)):
            key = tile_key(case.table, case.size)  # kernels that share a table are tuned once, by the first
            cases.setdefault(key, (case, (name, place)))
    compile_all([found for _, found in cases.values()])
    for key, (case, _) in cases.items():
        tiles = fitting_tiles(case.table, case.size, facts)
        times = measure_tiles(case, config.seconds, device)
        if not times:
            continue
        results[key] = tile = fastest(tiles, times)
        sizes = " ".join(f"{block}={size}" for block, size in tile.blocks.items())
        form = f" {tile.kernel.strip('_')}" if tile.kernel else ""
        took = f"{times[tiles.index(tile)]:.3f} ms, default {times.get(0, math.nan):.3f} ms"
        write_tuned(facts.name, results, choices)
        print(f"{key:40} {sizes} warps={tile.warps} stages={tile.stages}{form}: {took}", flush=True)
    if "orthogonalize" in kernels:
        times = dict(measure_gram(config.seconds, device))
        choices[GRAM_CHOICE] = str(from_where(times))
        shown = (f"{aspect}: {gram:.3f} and {plain:.3f} ms" for aspect, (gram, plain) in times.items())
        print(f"{GRAM_CHOICE:40} {choices[GRAM_CHOICE]}; with it and without, {', '.join(shown)}")
    for key, times in measure_backends(config.seconds, device) if "attention" in kernels else ():
        choices[key] = best = min(times, key=times.__getitem__)
        print(f"attention {key:30} {best}: {', '.join(f'{name} {ms:.3f} ms' for name, ms in times.items())}")
    print(write_tuned(facts.name, results, choices))
    return 0


def compile_all(found: list[tuple[str, int]]) -> None:
    """Compile the cases, given by module and index, on all cores. Failures show again when measuring."""
    workers = min(len(found), max(1, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_tiles, *case) for case in found]
        for future, (module, place) in zip(futures, found, strict=True):
            if error := future.exception():
                log.warning("%s, case %d, was not compiled ahead: %s", module, place, error)


def compile_tiles(module: str, place: int) -> None:
    """Fill Triton's cache: launch a case once with each of its tiles. Runs in a worker process."""
    device = torch.device("cuda")
    case = importlib.import_module(f"hotlap.kernels.{module}").cases(torch.bfloat16)[place]
    facts, launch = device_facts(device), case.run(device)
    for tile in fitting_tiles(case.table, case.size, facts):
        with choice_of(tuned(facts).tiles, tile_key(case.table, case.size), tile):
            launch()
    torch.cuda.synchronize()


def measure_tiles(case: Case, seconds: float, device: torch.device) -> dict[int, float]:
    """Milliseconds of each fitting tile that runs, by its index. Timings are interleaved."""
    facts = device_facts(device)
    tiles, launch = fitting_tiles(case.table, case.size, facts), case.run(device)
    chosen, key = tuned(facts).tiles, tile_key(case.table, case.size)

    def launch_with(tile: Tile, _: int) -> None:
        with choice_of(chosen, key, tile):
            launch()

    variants = {}
    for i, tile in enumerate(tiles):
        try:
            launch_with(tile, 0)
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            log.warning("%s does not run with %s: %s", case.kernel, tile, error)
        else:
            variants[str(i)] = partial(launch_with, tile)
    times = milliseconds(variants, seconds, device) if variants else {}
    return {int(i): ms for i, ms in times.items()}


@contextlib.contextmanager
def choice_of(chosen: dict[str, Tile], key: str, tile: Tile) -> Iterator[None]:
    """Make launches with this key use `tile`."""
    before, chosen[key] = chosen.get(key), tile
    pick_tile.cache_clear()
    try:
        yield
    finally:
        del chosen[key]
        if before is not None:
            chosen[key] = before
        pick_tile.cache_clear()


def milliseconds(variants: dict[str, Call], seconds: float, device: torch.device) -> dict[str, float]:
    timings = timing.measure(variants, device, seconds=seconds)
    return {name: 1e3 * timing.median for name, timing in timings.items()}


def fastest(tiles: list[Tile], times: dict[int, float]) -> Tile:
    """The fastest tile, or the default (the first) if none is clearly faster."""
    best = min(times, key=times.__getitem__)
    return tiles[best] if times[best] < MARGIN * times.get(0, math.inf) else tiles[0]


def measure_gram(seconds: float, device: torch.device) -> Iterator[tuple[float, tuple[float, float]]]:
    """For each aspect ratio, milliseconds to orthogonalise 12 matrices with a shorter side of 1536, with the
    Gram form and without.
    """
    for aspect in GRAM_ASPECTS:
        x = torch.randn(12, 1536, round(1536 * aspect), device=device, dtype=torch.float16)
        x /= aspect**0.5 * 1536**0.5  # so that the norm is 1536^0.5
        variants = {
            name: lambda _, x=x, limit=limit: _steps(x, POLAR_EXPRESS, 1536**0.5, limit)
            for name, limit in (("gram", 1.0), ("plain", math.inf))
        }
        times = milliseconds(variants, seconds, device)
        yield aspect, (times["gram"], times["plain"])


def from_where(times: dict[float, tuple[float, float]]) -> float:
    """The smallest aspect ratio from which the Gram form is always faster, of those tried; else inf."""
    least = math.inf
    for aspect in sorted(times, reverse=True):
        gram, plain = times[aspect]
        if gram >= MARGIN * plain:
            break
        least = aspect
    return least


def measure_backends(seconds: float, device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """For each head dim, length and window: its key, and milliseconds of each backend that supports it.

    Times forward and backward of 16k tokens at width 2048.
    """
    for C, T, window in itertools.product((64, 128), (1024, 2048, 4096, 8192, 16384), (None, 512, 1024)):
        if window and window >= T:
            continue
        shape = (3, 16384 // T, T, 2048 // C, C)
        inputs = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
        dy = torch.randn(shape[1:], device=device, dtype=torch.bfloat16)
        variants: dict[str, Call] = {}
        for backend in ("triton", *(("flash", "cudnn") if window is None else ()), "flash-attn"):
            run = partial(step, inputs, dy, window, backend)
            try:
                run(0)
            except (ValueError, RuntimeError, AssertionError) as error:  # not installed, or not for this GPU
                log.info("attention: %s is not available: %s", backend, error)
            else:
                variants[backend] = run
        yield case_key(C, T, window or 0), milliseconds(variants, seconds, device)


def step(inputs: torch.Tensor, dy: torch.Tensor, window: int | None, backend: str, _: int) -> None:
    y = attention(*inputs, window, backend=backend)
    torch.autograd.grad(y, inputs, dy)


def main(config: TuneConfig) -> int:
    """`hotlap bench tune`."""
    return tune(config)

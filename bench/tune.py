"""`hotlap bench tune`: measure the tiles of every table on the GPU at hand, and write down the fastest.

Each case runs at a size that does not fit the caches, in bfloat16. Kernels pick the measured tiles from then
on; the file is in the user's cache, and removing it undoes this.
"""

from __future__ import annotations

import importlib
import statistics
from dataclasses import dataclass

import torch

from hotlap.bench.static import MODULES
from hotlap.kernels.dispatch import INTERPRETED, device_facts, kernel_choice, triton
from hotlap.kernels.tiles import Case, Tile, fitting_tiles, pick_tile, tile_key, tuned_tiles, write_tuned

MARGIN = 0.98  # of the default's time: what a candidate has to beat, for less is noise


@dataclass(frozen=True)
class TuneConfig:
    """Measure the tiles of every kernel on this GPU, and write down the fastest for later runs."""

    kernel: tuple[str, ...] = MODULES
    """Files of kernels, such as rms_norm."""
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


def main(config: TuneConfig) -> int:
    """Measure, print a line a case, and write the file."""
    if unknown := [name for name in config.kernel if name not in MODULES]:
        raise ValueError(f"--kernel {unknown[0]} is unknown; known: {', '.join(MODULES)}")
    if not torch.cuda.is_available():
        raise ValueError("hotlap bench tune measures on a GPU, and this machine has none")
    if INTERPRETED or kernel_choice("cuda") != "triton":
        raise ValueError("hotlap bench tune is for Triton; unset HOTLAP_KERNELS and TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = device_facts(device)
    results = dict(tuned_tiles(facts.name))
    seen = set()
    for name in config.kernel:
        for case in importlib.import_module(f"hotlap.kernels.{name}").cases(torch.bfloat16):
            key, tiles = tile_key(case.table, case.size), fitting_tiles(case.table, case.size, facts)
            if key in seen:  # kernels that share a table are tuned by the first
                continue
            seen.add(key)
            times = measure(case, config.rounds, device)
            results[key] = tile = fastest(tiles, times)
            sizes = " ".join(f"{block}={size}" for block, size in tile.blocks.items())
            took = f"{times[tiles.index(tile)]:.3f} ms, default {times[0]:.3f} ms"
            print(f"{key:40} {sizes} warps={tile.warps} stages={tile.stages}: {took}")
    print(write_tuned(facts.name, results))
    return 0

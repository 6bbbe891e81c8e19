"""Tile sizes: each kernel file has a short table of candidates, best first, and this module picks one.

Candidates that need more shared memory or threads than the device has are skipped, so that no GPU fails at
its first call. `hotlap bench tune` measures the candidates on this GPU and stores the fastest, which are
preferred from then on. tuned/ has the results for GPUs that we measured, by compute capability: the same
instructions and shared memory make a better guess than the order of a table.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotlap.common import files
from hotlap.common.log import log
from hotlap.kernels.dispatch import Device, triton


@dataclass(frozen=True)
class Tile:
    """How one launch divides its work."""

    blocks: dict[str, int]  # the kernel's compile-time sizes
    warps: int = 4
    stages: int = 1
    per_processor: int = 1  # programs per processor, for persistent kernels
    shared: int = 0  # bytes of shared memory that it needs, where known
    kernel: str = ""  # name of another form of the kernel; empty: the plain one

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}

    def fits(self, device: Device) -> bool:
        return self.shared <= device.shared_memory and self.warps * device.warp <= 1024


Table = Callable[[int, Device], Sequence[Tile]]  # candidates for a size and a device, best first


@dataclass(frozen=True)
class Case:
    """One kernel at one typical size: what the static gate compiles, and what the tuner measures."""

    kernel: str  # its name in the module
    arguments: dict[str, Any]  # name to a type as Triton writes it ("*bf16", "i32"), or to a constant's value
    table: Table
    size: int
    run: Callable[[torch.device], Callable[[], Any]]  # allocates on a device; the result launches the kernel
    variant: str = ""  # tells apart cases of the same kernel and size
    without: tuple[str, ...] = ()  # targets of the static gate that cannot run it
    # by name, the arguments of other forms of the kernel for a tile; None: all forms take the same
    forms: dict[str, Callable[[Tile], dict[str, Any]]] | None = None
    small: bool = False  # its matmuls have too few rows for the newest GPUs' tensor-core instructions

    def arguments_of(self, tile: Tile) -> dict[str, Any] | None:
        """Arguments for the form of the kernel that a tile belongs to; None if the form does not take this
        case."""
        if not tile.kernel or self.forms is None:
            return self.arguments
        form = self.forms.get(tile.kernel)
        return form and self.arguments | form(tile)


def tuned_file(name: str) -> Path:
    """The file with the tiles measured on a device of this machine."""
    return files.cache_folder() / "tiles" / _slug(name)


def shipped_file(compute: int) -> Path:
    """The file with the tiles that ship with the kernels, for a compute capability; it may not exist."""
    return Path(__file__).parent / "tuned" / f"sm_{compute}.json"


def _slug(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"


class Tuned(NamedTuple):
    """What was measured on a device, by key."""

    tiles: dict[str, Tile]
    choices: dict[str, str]  # all but tiles, such as attention backends
    device: str = ""  # its name


@functools.cache
def tuned(device: Device) -> Tuned:
    """What ships with the kernels for devices like this one, overridden by what was measured here."""
    shipped = read_tuned(shipped_file(device.compute), any_triton=True)
    here = read_tuned(tuned_file(device.name))
    if shipped.tiles and not here.tiles and shipped.device != device.name:
        log.info("tiles of kernels are those for an %s; for this GPU's: hotlap bench tune", shipped.device)
    return Tuned(shipped.tiles | here.tiles, shipped.choices | here.choices, device.name)


def read_tuned(path: Path, any_triton: bool = False) -> Tuned:
    """What is in a file; empty if there is no file. any_triton: accept what was measured under another
    version, which is better than a guess.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tiles = {key: Tile(**tile) for key, tile in stored["tiles"].items()}
        choices = dict(stored.get("choices", {}))
        device = str(stored.get("device", ""))
    except FileNotFoundError:
        return Tuned({}, {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or run: hotlap bench tune") from None
    if stored.get("triton") != triton.__version__ and not any_triton:
        log.warning("tiles in %s are for triton %s; run again: hotlap bench tune", path, stored.get("triton"))
        return Tuned({}, {})
    return Tuned(tiles, choices, device)


def write_tuned(name: str, tiles: dict[str, Tile], choices: dict[str, str]) -> Path:
    """Store what was measured on a device, and clear the caches."""
    path = tuned_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "device": name,
        "triton": triton.__version__,
        "tiles": {key: asdict(tile) for key, tile in tiles.items()},
        "choices": choices,
    }
    files.write_object(path, text)
    tuned.cache_clear()
    pick_tile.cache_clear()
    return path


def fitting_tiles(table: Table, size: int, device: Device) -> list[Tile]:
    """Candidates that fit the device's shared memory and threads; ValueError if none does."""
    fitting = [tile for tile in table(size, device) if tile.fits(device)]
    if not fitting:
        raise ValueError(
            f"no tile of {tile_key(table, size)} fits {device.name}, which has {device.shared_memory} bytes "
            "of shared memory a block; HOTLAP_KERNELS=torch does without"
        )
    return fitting


@functools.cache
def pick_tile(table: Table, size: int, device: Device) -> Tile:
    """The measured tile for this table and size, or else the first tile that fits the device.

    A measured tile counts only while it is in the table.
    """
    fitting = fitting_tiles(table, size, device)
    measured = tuned(device).tiles.get(tile_key(table, size))
    return measured if measured in fitting else fitting[0]


def tile_key(table: Table, size: int) -> str:
    """The name of a table at a size, such as `rms_norm_forward 4096`."""
    return f"{table.__name__.strip('_').removesuffix('_tiles')} {size}"


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n; 0 for 0. A symbolic n becomes a number."""
    n = int(n)
    return 1 << (n - 1).bit_length() if n else 0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes several microseconds of each launch."""
    return -(-a // b)


def as_rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) with unit stride along N: a view where the strides allow it, else a copy."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # prod, as Size.numel makes numbers of symbols
    return x if x.stride(1) == 1 else x.contiguous()


def type_name(dtype: torch.dtype) -> str:
    """Triton's name of a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

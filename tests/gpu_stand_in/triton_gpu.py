"""Triton believes in an H100: every launch is compiled for sm_90 by the real launch path, and does nothing.

What Triton asks of a GPU it asks of its driver, so a driver that answers is all it takes. Of each kernel that
is loaded, the stand-in keeps what the compiler made of it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_stand_in.patches import find, put
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from hotlap.bench.static import TARGETS, resources
from hotlap.kernels import dispatch, tiles

H100 = TARGETS["sm_90"].device._replace(name="NVIDIA H100 80GB HBM3")
# Arguments that count rows, heads or keys: their being no multiple of 16 leaves rows aligned.
COUNTS = {"B", "H", "K", "T", "S", "M", "window", "section"}


@dataclass
class Loaded:
    """A kernel as it was compiled for one set of arguments."""

    name: str
    sizes: dict[str, Any]  # its compile-time arguments, warps and stages
    usual: bool  # whether its numbers have 16 bits and lie in aligned rows, as they do in training
    registers: int = 0
    spilled: int = 0  # bytes a thread
    seen: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.sizes}: {self.registers} registers, {self.spilled} bytes spilled"


def is_usual(source) -> bool:
    """Of what Triton compiles, whether its arguments are like those of training."""
    types, names = source.signature, source.fn.arg_names
    aligned = {names[place[0]] for place, facts in source.attrs.items() if ["tt.divisibility", 16] in facts}
    apart = {name for name, type_ in types.items() if type_[0] in "*i"} - aligned - COUNTS
    return not apart and any(type_[0] == "*" and type_.endswith("16") for type_ in types.values())


class Seen:
    """What happened in this process."""

    def __init__(self):
        self.loaded: list[Loaded] = []
        self.launches = 0
        # kernels that eager code launched by torch's operator for kernels, and whether an operation did
        self.wrapped: list[tuple[str, bool]] = []
        self.in_graph = 0  # graphs that run at this moment: they may launch so
        self.picked: list[tiles.Tile] = []  # by pick_tile

    def new(self) -> list[Loaded]:
        """Kernels whose tile is one that is picked where nothing was tuned, once each; none of Inductor's."""
        tiles_ = [tile.arguments.items() for tile in self.picked]
        found = [k for k in self.loaded if not k.seen and any(tile <= k.sizes.items() for tile in tiles_)]
        for kernel in found:
            kernel.seen = True
        return found

    def graph(self, run: Callable) -> Callable:
        """run, of a graph."""

        @functools.wraps(run)
        def running(*given, **named):
            self.in_graph += 1
            try:
                return run(*given, **named)
            finally:
                self.in_graph -= 1

        return running


seen = Seen()


class Launcher:
    """Takes the place of the C function that launches."""

    def __init__(self, source, metadata):
        names = source.fn.arg_names
        constants = {names[place[0]]: value for place, value in source.constants.items()}
        sizes = constants | {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
        seen.loaded.append(Loaded(metadata.name, sizes, is_usual(source)))

    def __call__(self, *arguments, **named) -> None:
        seen.launches += 1


class Utils:
    """What Triton asks of libcuda."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": H100.shared_memory,
            "multiprocessor_count": H100.processors,
            "warpSize": H100.warp,
            "max_num_regs": 65536,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spilled registers, most threads of a block."""
        kernel = seen.loaded[-1]  # its launcher was made just before
        kernel.registers, kernel.spilled = resources(binary)
        return object(), 1, kernel.registers, kernel.spilled // 4, 1024


class Driver(DriverBase):
    def __init__(self):
        self.utils, self.launcher_cls = Utils(), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, H100.warp)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        return lambda call, **_: [1.0, 1.0, 1.0]  # any form of a kernel is as good as another


def install(on_cpu: bool) -> None:
    """To be called before kernel files are imported: they take names from the two that are changed here.

    on_cpu: tensors are there, and are taken to be on the GPU.
    """
    assert not dispatch.INTERPRETED, "TRITON_INTERPRET has to be 0 before Triton is imported"
    # stands for: Triton's driver, which is looked up here the first time, and by Inductor each time
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], driver=Driver)
    if on_cpu:
        # stand for: tensors on a GPU
        chosen = functools.cache(lambda _: os.environ.get("HOTLAP_KERNELS") or "triton")
        put("hotlap.kernels.dispatch._decide", chosen)
        put("hotlap.kernels.dispatch.device_facts", functools.cache(lambda _: H100))
    note_tiles()
    note_wrapped_launches()


def note_tiles() -> None:
    """Keep the tiles that are used where nothing was tuned."""
    pick = tiles.pick_tile

    @functools.wraps(pick)
    def noted(*arguments):
        tile = pick(*arguments)
        if tile not in seen.picked:
            seen.picked.append(tile)
        return tile

    noted.cache_clear = pick.cache_clear
    put("hotlap.kernels.tiles.pick_tile", noted)


def within_operation() -> bool:
    """Whether this is called by an operation or its gradient, and not by a test that launches by itself."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.endswith(("kernels/dispatch.py", "autograd/function.py")):
        frame = frame.f_back
    return frame is not None


def note_wrapped_launches() -> None:
    """Keep the launches by torch's operator for kernels, which takes six times as long as one without it."""
    operator = "torch._higher_order_ops.triton_kernel_wrap"
    rules = find(f"{operator}.triton_kernel_wrapper_mutation.py_kernels")
    table = find(f"{operator}.kernel_side_table")
    launch = find(f"{operator}.triton_kernel_wrapper_mutation_dense")
    if None in (rules, table, launch):
        return

    def noted(*, kernel_idx, **arguments):
        if not seen.in_graph:
            seen.wrapped.append((table.get_kernel(kernel_idx).fn.__name__, within_operation()))
        return launch(kernel_idx=kernel_idx, **arguments)

    rules[torch._C.DispatchKey.CompositeExplicitAutograd] = noted

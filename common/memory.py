"""How much memory a device has, and an error before more is taken than that."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GB = 1e9
CGROUPS = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
# The file with the limit of a control group: by version 2, and by version 1's controller of memory.
LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return machine_bytes()


@functools.cache
def machine_bytes() -> int:
    """Bytes of memory of the machine, or of the container if that is less. Swap does not count."""
    groups = Path("/proc/self/cgroup")
    text = groups.read_text(encoding="utf-8") if groups.exists() else ""
    return min([physical_bytes(), *limits(text, CGROUPS)])


def physical_bytes() -> int:
    """Bytes of memory of the machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = (ctypes.c_uint64 * 8)(64)  # Windows: MEMORYSTATUSEX, which begins with its size in bytes
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[1]


def free_memory(device: torch.device) -> int:
    """Bytes of memory that could be taken now: of a GPU, or of the machine and its container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    lines = MEMORY.read_text(encoding="utf-8").splitlines() if MEMORY.exists() else []
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([machine_bytes(), *available])


def limits(groups: str, root: Path) -> list[int]:
    """The limits in bytes of control groups and of those above. groups: the text of /proc/self/cgroup."""
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in {"", "memory"} & set(controllers.split(",")):
            top = root / controller
            folder = top / path.lstrip("/")
            for place in (folder, *folder.parents):  # a container may see its own group as the root
                if place.is_relative_to(top) and (place / LIMITS[controller]).is_file():
                    text = (place / LIMITS[controller]).read_text(encoding="utf-8").strip()
                    found += [int(text)] if text.isdigit() else []  # else "max"
    return found


def require_memory(
    what: str, needed: float, hint: str, device: torch.device | None = None, processes: int = 1
) -> None:
    """Raise ValueError if `needed` bytes, a lower bound, are more than a device has in all.

    hint: what to change. device: None is the machine. processes: that share the machine, each of which needs
    as much.
    """
    if device is not None and device.type == "cuda":
        held, where = memory_of(device), "the GPU"
    else:
        held, where = machine_bytes() // processes, "each process" if processes > 1 else "this machine"
    if needed > held:
        raise ValueError(f"{what} needs at least {amount(needed)}, and {where} has {amount(held)}; {hint}")


def amount(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size < 1e15 else f"{size / GB:.2g} GB"

"""Compile the kernels for CPUs with the C compiler of this machine, and call them.

They are built for exactly this CPU, in three seconds for each dtype, when they are first needed. The library
is kept in the cache folder, under a name that depends on the sources, the compiler and the CPU, and on its
content, so that a damaged file is not loaded but built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hotlap.common import files

SOURCES = Path(__file__).parent
# No -ffast-math, which would forget about NaN. OpenMP's symbols are found in the runtime that torch has
# loaded, so that its threads are ours.
FLAGS = (
    "-std=c11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fPIC", "-shared",
)  # fmt: skip
MACROS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}  # the dtypes that there are kernels for


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors of this dtype. OSError if there is no compiler, or it fails."""
    if sys.platform == "win32":
        raise OSError("they are not built on Windows")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not shutil.which(compiler[0]):
        raise OSError(f"there is no C compiler {compiler[0]!r}")
    command = [*compiler, *FLAGS, *MACROS[dtype]]
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, errors="replace"
    ).stdout
    sources = sorted(SOURCES.glob("*.[ch]"))
    identity = repr(
        (command, version, cpu_identity(), [source.read_text(encoding="utf-8") for source in sources])
    )
    folder, key = files.cache_folder() / "cpu", hashlib.sha256(identity.encode()).hexdigest()[:24]
    path = next(filter(_intact, folder.glob(f"{key}-*.so")), None)
    if path is None:
        command += [str(source) for source in sources if source.suffix == ".c"]
        path = _compile(command, folder, key)
    return ctypes.CDLL(str(path))


def _content_name(path: Path) -> str:
    return files.file_sha256(path)[:24]


def _intact(path: Path) -> bool:
    """Half a library, after a crash of the machine, would end the process that loads it."""
    return path.stem.endswith(_content_name(path))


def _compile(command: list[str], folder: Path, key: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:  # other processes see the whole file or none
        built = Path(part) / "built.so"
        result = subprocess.run(
            [*command, "-o", str(built), "-lm"], capture_output=True, text=True, errors="replace"
        )
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr)
            raise OSError(f"{command[0]} failed: {reason.strip()}")
        return built.replace(folder / f"{key}-{_content_name(built)}.so")


def cpu_identity() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() + platform.machine()
    described = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    lines = info.read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0] in described}))


PLAIN = {int, float, type(None)}  # what ctypes passes as it is
called: dict[tuple[str, torch.dtype], Callable] = {}  # the functions that were, by name and dtype


def run(name: str, dtype: torch.dtype, *arguments: Tensor | Sequence[int] | int | float | None) -> None:
    """Call a function of `library(dtype)`.

    A tensor is passed as its address, None as NULL, a sequence of integers as an array, other integers as
    int64_t, and floats as double. An argument is of one of these kinds in all calls.
    """
    values = [x if type(x) in PLAIN else _address(x) for x in arguments]
    (called.get((name, dtype)) or _function(name, dtype, arguments))(*values)


def _address(x: Tensor | Sequence[int]) -> object:
    return x.data_ptr() if isinstance(x, Tensor) else (ctypes.c_int64 * len(x))(*x)


def _function(name: str, dtype: torch.dtype, arguments: tuple) -> Callable:
    """A function that knows the types of its arguments: naming them in each call takes 10 us."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_double}
    function = getattr(library(dtype), name)
    function.argtypes = [kinds.get(type(x), ctypes.c_void_p) for x in arguments]
    function.restype = None
    called[name, dtype] = function
    return function

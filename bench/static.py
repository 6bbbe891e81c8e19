"""`hotlap bench static`: compile every kernel for six GPU architectures, without a GPU, and check the code.

A kernel has a fault if it does not compile, exceeds shared memory, has a matmul without tensor-core
instructions or tensor descriptors without TMA, computes in float64 (Inductor passes floats as float64;
narrowing them is fine), or reads tiles of 16-bit numbers in less than 16 bytes per thread although rows are
aligned. The default tile of each form of the kernel must also not spill much, nor keep more programs on a
multiprocessor than fit. Results are cached by kernel source and tool versions.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hotlap.bench.config import StaticConfig
from hotlap.common import files
from hotlap.kernels.dispatch import INTERPRETED, Device, triton
from hotlap.kernels.tiles import Tile, fitting_tiles

MODULES = (
    "embedding",
    "rms_norm",
    "qkv",
    "relu2",
    "cross_entropy",
    "attention_forward",
    "attention_backward",
    "decode_attention",
    "decode_linear",
    "linear_relu2",
    "fp8",
    "orthogonalize",
    "muon",
)
# Bytes per thread that a default tile may spill. Some spilling does not matter: for dk and dv with heads of
# 256, an H100 took 5.0 ms with a tile that spills 104 bytes, and 6.6 ms with one that spills 8.
SPILL = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Target(NamedTuple):
    """A GPU architecture: the limits of a block and of a multiprocessor."""

    device: Device
    backend: str
    architecture: int | str
    tensor_core: str  # pattern of the instruction
    shared: int  # bytes per multiprocessor
    warps: int  # per multiprocessor
    blocks: int  # per multiprocessor
    registers: int = 65536  # per multiprocessor, 32 bits each


def nvidia(
    name: str, compute: int, tensor_core: str, shared_kib: int, warps: int, blocks: int, processors: int
):
    block = (shared_kib - 1) << 10  # 1 KiB is reserved per block
    return Target(
        Device(name, block, processors, tma=compute >= 90, compute=compute),
        "cuda",
        compute,
        tensor_core,
        shared_kib << 10,
        warps,
        blocks,
    )


TARGETS = {
    "sm_80": nvidia("A100", 80, r"mma\.sync", 164, 64, 32, 108),
    "sm_89": nvidia("RTX 4090", 89, r"mma\.sync", 100, 48, 24, 128),
    "sm_90": nvidia("H100", 90, r"wgmma\.mma", 228, 64, 32, 132),
    "sm_100": nvidia("B200", 100, r"tcgen05\.mma", 228, 64, 32, 148),
    "sm_120": nvidia("RTX 5090", 120, r"mma\.sync", 100, 48, 24, 170),
    "gfx942": Target(
        Device("MI300X", 65536, 304, warp=64),
        "hip",
        "gfx942",
        r"v_mfma",
        65536,
        32,
        32,
        registers=4 * 512 * 64,
    ),
}


def run(config: StaticConfig, modules: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Compile everything, and return the rows. modules: what to import for each name in config.kernel."""
    modules = modules or {name: f"hotlap.kernels.{name}" for name in MODULES}
    config = StaticConfig(config.arch or tuple(TARGETS), config.kernel or tuple(modules), config.all)
    for name, given, known in (("arch", config.arch, TARGETS), ("kernel", config.kernel, modules)):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"--{name} {unknown[0]} is unknown; known: {', '.join(known)}")
    if triton is None:
        raise ValueError("hotlap bench static needs Triton: pip install triton")
    if INTERPRETED:
        raise ValueError("hotlap bench static cannot compile with TRITON_INTERPRET=1; unset it")
    context = multiprocessing.get_context("spawn")  # a forked process that has used torch may hang
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), context) as pool:
        return list(pool.map(examine, jobs(config, modules), chunksize=1))


class Job(NamedTuple):
    """One compilation, by names that a worker process can look up."""

    module: str  # to import
    case: int  # index into the module's cases
    dtype: str
    target: str
    tile: int  # index into the table
    default: bool


def jobs(config: StaticConfig, modules: dict[str, str]) -> list[Job]:
    """modules: the module to import for each name in config.kernel."""
    found = []
    for name in config.kernel:
        for dtype in DTYPES if config.all else ("fp32", "bf16"):
            for i, case in enumerate(importlib.import_module(modules[name]).cases(DTYPES[dtype])):
                for target in (name for name in config.arch if name not in case.without):
                    device = TARGETS[target].device
                    table = list(case.table(case.size, device))
                    fitting = fitting_tiles(case.table, case.size, device)
                    fitting = [tile for tile in fitting if case.arguments_of(tile) is not None]
                    first = {tile.kernel: tile for tile in reversed(fitting)}  # for each form of the kernel
                    for tile in fitting if config.all else reversed(first.values()):
                        default = tile == first[tile.kernel]
                        found.append(Job(modules[name], i, dtype, target, table.index(tile), default))
    return found


def examine(job: Job) -> dict[str, Any]:
    """Compile a job, unless it is cached, and return its row of the table with a list of faults."""
    module, target = importlib.import_module(job.module), TARGETS[job.target]
    case = module.cases(DTYPES[job.dtype])[job.case]
    tile = list(case.table(case.size, target.device))[job.tile]
    name = tile.kernel or case.kernel
    kernel, arguments = getattr(module, name), case.arguments_of(tile)
    identity = repr((job, arguments, tile, kernel.cache_key, triton.__version__))
    digest = hashlib.sha256(identity.encode() + Path(__file__).read_bytes()).hexdigest()
    stored = files.cache_folder() / "static" / f"{digest}.json"
    if stored.exists():
        return json.loads(stored.read_text(encoding="utf-8"))
    row = {
        "kernel": name.strip("_").removesuffix("_kernel"),
        "case": " ".join(filter(None, (str(case.size or ""), job.dtype, case.variant))),
        "target": job.target,
        "tile": "x".join(str(size) for size in tile.blocks.values()) + f" w{tile.warps} s{tile.stages}",
    }
    try:
        compiled = compile_case(kernel, arguments, tile, target)
        row |= judge(compiled, tile, target, job.default, case.small)
    except Exception as error:  # any compiler error is a fault; not cached, as it may be transient
        text = " ".join(str(error).split())[:200]
        return row | {"faults": [f"does not compile: {type(error).__name__} {text}"]}
    stored.parent.mkdir(parents=True, exist_ok=True)
    files.write(stored, json.dumps(row))
    return row


def compile_case(kernel, arguments: dict[str, Any], tile: Tile, target: Target):
    """Compile with Triton. Pointers and integers are declared multiples of 16, as for aligned rows."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    values = {"STAGES": tile.stages, **tile.blocks, **arguments}
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(values[name], str):
            signature[name] = values[name]
            if values[name][0] in "*i":
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", values[name]
    kind = GluonASTSource if getattr(kernel, "is_gluon", bool)() else ASTSource
    source = kind(kernel, signature=signature, constexprs=constants, attrs=aligned)
    gpu = GPUTarget(target.backend, target.architecture, target.device.warp)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=gpu, options=options)


def judge(compiled, tile: Tile, target: Target, default: bool, small: bool = False) -> dict[str, Any]:
    """Statistics of a compiled kernel, and its faults. small: see `Case`."""
    code, shared = compiled.asm.get("ptx") or compiled.asm["amdgcn"], compiled.metadata.shared
    if target.backend == "cuda":
        registers, spilled = resources(compiled.asm["cubin"])
        instructions = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", code, re.MULTILINE)
        narrowing = ("ld.", "mov.", "cvt.rn.f32.f64")
        float64 = {name for name in instructions if ".f64" in name and not name.startswith(narrowing)}
    else:
        registers = max(int(x) for x in re.findall(r"\.vgpr_count: +(\d+)", code))
        # scalars spill to lanes of vector registers, not to memory
        spilled = sum(int(x) for x in re.findall(r"\.private_segment_fixed_size: +(\d+)", code))
        float64 = set(re.findall(r"\bv_(?!cvt_f32_f64)\w+_f64\w*", code))
    resident = blocks_resident(registers, shared, compiled.metadata.num_warps, target)
    tensor_core = len(re.findall(rf"{target.tensor_core}|mma\.sync" if small else target.tensor_core, code))
    ttir = compiled.asm.get("ttir", "")  # Gluon has none
    wanted, loads = tile_bytes(ttir, target.device.warp * tile.warps), accesses(code, "load")
    wide = sum(size for size in loads if size >= 16)  # can also be less than wanted if branches share a load
    narrow = sum(loads) - wide
    faults = []
    if shared > target.device.shared_memory:
        faults.append(f"needs {shared} bytes of shared memory; a block has {target.device.shared_memory}")
    if shared > tile.shared > 0:
        faults.append(f"needs {shared} bytes of shared memory; its tile states {tile.shared}")
    if spilled > SPILL and default:
        faults.append(f"spills {spilled} bytes per thread")
    if ("tt.dot" in ttir or "warp_group_dot" in compiled.asm["source"]) and not tensor_core:
        faults.append("has a matmul without tensor-core instructions")
    if "tt.descriptor_load" in compiled.asm["source"] and "cp.async.bulk.tensor" not in code:
        faults.append("has tensor descriptors without TMA instructions")
    if float64:
        faults.append(f"computes in float64: {', '.join(sorted(float64))}")
    if narrow >= wanted - wide > 0:
        faults.append(
            f"reads tiles narrowly: {narrow} bytes per thread in loads under 16 bytes, {wide} in others"
        )
    if resident < tile.per_processor and default:
        faults.append(f"keeps {tile.per_processor} programs on a multiprocessor that holds {resident}")
    return {
        "shared": shared,
        "registers": registers,
        "spilled": spilled,
        "occupancy": round(resident * compiled.metadata.num_warps / target.warps, 2),
        "tensor_core": tensor_core,
        "load": max(loads, default=0),
        "store": max(accesses(code, "store"), default=0),
        "float64": len(float64),
        "faults": faults,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes per thread: Triton's kernels use the stack only for spills.

    A stack that is never loaded from does not count: with descriptors, compilers may only zero one.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(flag: str) -> str:
            return subprocess.run(
                [tool, flag, file.name], capture_output=True, encoding="utf-8", check=True
            ).stdout

        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", read("-res-usage")).groups())
        used = stack and re.search(r"\bLDL\b", read("-sass"))
    return registers, stack if used else 0


def blocks_resident(registers: int, shared: int, warps: int, target: Target) -> int:
    """How many blocks a multiprocessor holds at once."""
    if target.backend == "cuda":
        of_a_warp = -(-registers * 32 // 256) * 256
        by_registers = target.registers // of_a_warp // warps
    else:  # four SIMDs with 512 vector registers per lane, allocated in eights, and at most eight waves each
        by_registers = 4 * min(8, 512 // max(8, -(-registers // 8) * 8)) // warps
    reserve = 1024 if target.backend == "cuda" else 0
    by_shared = target.shared // (shared + reserve) if shared else target.blocks
    return min(by_registers, by_shared, target.warps // warps, target.blocks)


def tile_bytes(ttir: str, threads: int) -> int:
    """Bytes per thread in loads of the largest tiles, for a kernel that loads 16-bit tiles; else 0."""
    loads = re.findall(r"tt\.load .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>", ttir)
    sizes = [(math.prod(map(int, shape.split("x"))), int(bits) // 8) for shape, bits in loads]
    largest = max((size for size, _ in sizes), default=0)
    tiles = [bytes_ for size, bytes_ in sizes if size == largest]
    return sum(bytes_ * largest // threads for bytes_ in tiles) if 2 in tiles else 0


AMD_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "short": 2,
    "ushort": 2,
    "byte": 1,
    "ubyte": 1,
}


def accesses(code: str, kind: str) -> list[int]:
    """Bytes per thread of each global "load" or "store", in PTX or AMD assembly."""
    found = []
    for suffix in re.findall(rf"\b{'ld' if kind == 'load' else 'st'}\.global([\w.:]*)", code):
        vector, bits = re.search(r"\.v(\d)\b", suffix), re.search(r"\d+$", suffix)
        found.append(int(vector[1] if vector else 1) * int(bits[0]) // 8)
    if kind == "load":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], *\[[^]]*\], *(\w+)", code)
        found += [int(size, 0) for size in copies]
    words = re.findall(rf"\b(?:global|buffer|flat)_{kind}_([a-z]+\d?)", code)
    return found + [AMD_BYTES[word] for word in words]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, one per line, each followed by its faults."""
    columns = [name for name in max(rows, key=len, default={}) if name != "faults"]
    cells = [columns, *([str(row.get(column, "-")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, values in zip([{}, *rows], cells, strict=True):
        lines.append("  ".join(map(str.ljust, values, widths)).rstrip())
        lines += [f"    FAULT: {fault}" for fault in row.get("faults", ())]
    return "\n".join(lines)


def main(config: StaticConfig) -> int:
    """`hotlap bench static`: print the table; exit code 1 if a kernel has a fault."""
    start = time.monotonic()
    rows = run(config)
    print(table(rows))
    faulty = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} compiled, {faulty} with faults, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 1 if faulty else 0

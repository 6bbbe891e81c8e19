"""Where the time of a training step goes, kernel by kernel: the suite's `breakdown` phase.

torch.profiler's kernel times are summed by name and by kind over one step, after warm-up steps. Open the
trace at https://ui.perfetto.dev.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hotlap.bench import results
from hotlap.bench.models import ROWS, model_config
from hotlap.bench.training import UNTIMED, made, random_batches, step_seconds
from hotlap.common import files
from hotlap.common.log import log
from hotlap.common.process import keep_freed_memory
from hotlap.train.distributed.world import joined
from hotlap.train.losses import next_token_loss
from hotlap.train.passes import Passes

KINDS = (  # the first pattern found in a kernel's name counts
    ("our attention", r"_attention_"),
    ("our QK-norm, rotary and value embeddings", r"_qkv_"),
    ("our Muon", r"_muon_|_symmetric_"),
    ("our cross-entropy", r"_cross_entropy"),
    ("our linear + ReLU^2", r"_linear_relu2"),
    ("our norms and elementwise kernels", r"_rms_norm|_relu2|_largest|_quantize|_transpose"),
    ("attention of torch", r"flash|fmha|cudnn.*(sdpa|attention)|mha"),
    ("matmul", r"gemm|nvjet|aten::b?mm$|cutlass|cublas|sm90_xmma|splitK|scaled_mm"),
    ("compiled by Inductor", r"^triton_"),
    ("AdamW", r"FusedOptimizer|[Aa]dam"),
    ("norms of gradients, stacking", r"multi_tensor_apply|CatArray"),
    ("copies and casts", r"[Mm]em(cpy|set)|copy"),
    ("communication", r"nccl"),
    ("embedding", r"embedding|index|compute_grad_weight|sum_and_scatter|gather|[Rr]adix|krn_partial"),
)


@dataclass(frozen=True)
class BreakdownConfig:
    """Profile one training step."""

    model: str = "d24"
    """A model of `hotlap bench training`."""
    rows: int = 0
    """Rows per step; 0: a usual number for the model."""
    steps: int = 8
    """Warm-up steps before the profiled one."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""


def break_down(config: BreakdownConfig) -> list[dict]:
    """Write breakdown.json, breakdown.txt and trace.json.gz, and return the rows: milliseconds of the step,
    and by kind of kernel.
    """
    shape, rows = model_config(config.model), config.rows or ROWS[config.model]
    with joined() as world:
        path = results.open_file("breakdown", config.out, world.device)
        on_gpu = world.device.type == "cuda"
        model, optimizer = made(shape, on_gpu, False, world)
        if not on_gpu:
            keep_freed_memory()
        passes = Passes(model, next_token_loss)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with random_batches(shape, rows, config.steps + UNTIMED, world) as batches:
            steps = step_seconds(passes, optimizer, batches, 1, config.steps, world)
            with profile(activities=activities, acc_events=True) as profiler:
                (parts,) = step_seconds(passes, optimizer, batches, 1, 1, world)
        found = kernel_times(profiler, on_gpu)
        case = f"{config.model} {rows}x{shape.context}"
        table = [{"case": case, "provider": "whole step, before", "ms": 1e3 * sum(steps[-1])}]
        table += [{"case": case, "provider": "whole step, profiled", "ms": 1e3 * sum(parts)}]
        table += [{"case": case, "provider": kind, "ms": ms} for kind, ms in by_kind(found)]
        results.save(path, table, world.device)
        files.write(path.with_suffix(".txt"), listed(found))
        trace = path.with_name("trace.json")
        profiler.export_chrome_trace(str(trace))
        with open(trace, "rb") as plain, gzip.open(f"{trace}.gz", "wb", compresslevel=3) as packed:
            shutil.copyfileobj(plain, packed)
        trace.unlink()
        log.info("written to %s", path)
    return table


def kernel_times(profiler: profile, on_gpu: bool) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls by kernel name; by operation on a CPU."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            ms, count = found.get(event.key, (0.0, 0))
            found[event.key] = (ms + time / 1e3, count + event.count)
    return found


def listed(found: dict[str, tuple[float, int]]) -> str:
    """A line for each kernel, the slowest first."""
    by_time = sorted(found.items(), key=lambda item: -item[1][0])
    return "".join(f"{ms:10.3f} ms {count:6} x  {name[:150]}\n" for name, (ms, count) in by_time)


def by_kind(found: dict[str, tuple[float, int]]) -> list[tuple[str, float]]:
    """Milliseconds by kind of kernel, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, (ms, _) in found.items():
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
        sums[kind] += ms
    return sorted(sums.items(), key=lambda item: -item[1])

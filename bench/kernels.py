"""`hotlap bench kernels`: every operation by every provider that is installed, right first, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hotlap.bench import results
from hotlap.bench.operations import operations
from hotlap.bench.peaks import Ceilings, log_warnings, measure_ceilings
from hotlap.bench.plots import draw_kernels
from hotlap.bench.providers import CONTEXT, Function, Operation
from hotlap.bench.timing import (
    NO_TIME,
    Timing,
    buffer_sets,
    deadline,
    measure,
    side_stream,
    start_afresh,
)
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.train.log import log

ERROR_FACTOR = 2.0  # a provider may be this much further from float64 than torch in the same dtype
# What a provider may be off by in any case: rounding of the dtype.
SMALLEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CHECKED_ROWS = 2048  # of the sizes that are compared with float64


@dataclass(frozen=True)
class KernelsConfig:
    """Measure each operation: ours against torch, torch.compile, and every other provider that is
    installed.
    """

    operations: tuple[str, ...] = ()
    """Of rms_norm, rms_norm_residual, relu2, linear_relu2, rotary, attention, windowed_attention,
    decode_attention, cross_entropy, linear_cross_entropy, linear_cross_entropy_uncapped and orthogonalize;
    none is all. attention_lengths: rows of 1k to 16k, only where it is named."""
    rows: int = 0
    """Rows of tokens, up to 2048 or a multiple of that; 0 is 16384 on a GPU, 1024 on a CPU."""
    seconds: float = 0.2
    """Time for each provider in each direction."""
    compile: bool = True
    """Measure torch.compile too, which takes a while to compile."""
    minutes: float = 0
    """Start nothing new after so many minutes, and list what was left out; 0 is no limit."""
    out: Path | None = None
    """Folder for the results; by default bench/results/DEVICE."""


def bench_kernels(config: KernelsConfig) -> list[dict]:
    """Measure everything, write kernels.json, .csv and .png, and return the rows.

    A provider that is wrong is a row that says so and is not timed; out of memory is a row too.
    """
    if not config.seconds > 0:
        raise ValueError(f"seconds={config.seconds} must be positive")
    if config.rows < 0 or (config.rows > CONTEXT and config.rows % CONTEXT):
        raise ValueError(
            f"rows={config.rows} must be at most {CONTEXT} or a multiple of it; 0 is the default"
        )
    end, device = deadline(config.minutes), default_device()
    dtype = fast_dtype(device.type)
    log_warnings(device)
    ceilings = measure_ceilings(device)
    log.info(
        "measured ceilings: copy %.4g TB/s, product %.4g TFLOP/s",
        ceilings.copy / 1e12,
        ceilings.product / 1e12,
    )
    count = config.rows or (16384 if device.type == "cuda" else 1024)
    checked = {
        (o.name, o.size.split()[0]): o
        for o in operations(min(count, CHECKED_ROWS), device, dtype, config.operations)
    }
    folder = config.out or results.device_folder(device)
    rows: list[dict] = []
    for operation in operations(count, device, dtype, config.operations):
        if time.monotonic() > end:
            case = f"{operation.name} {operation.size}"
            rows.append({"case": case, "provider": "hotlap", "ms": None, "note": NO_TIME})
        else:
            small = checked[operation.name, operation.size.split()[0]]
            rows += bench_operation(operation, small, config, ceilings, device)
        path = results.save("kernels", rows, folder, device, ceilings=vars(ceilings))
    draw_kernels(rows, path.with_suffix(".png"))
    log.info("written to %s", path)
    return rows


@torch._functorch.config.patch(donated_buffer=False)  # or a compiled backward pass runs only once
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # or what is timed would not be compiled
def bench_operation(
    operation: Operation, small: Operation, config: KernelsConfig, ceilings: Ceilings, device
) -> list[dict]:
    """The rows of one operation: for each direction and provider."""
    start_afresh(device)
    providers, rows = {}, []
    limit = allowed_error(small)
    for name, function in operation.providers.items():
        if name == "compile" and not config.compile:
            continue
        note = fault(small, small.providers[name], limit)
        if note:
            rows.append(
                {"case": f"{operation.name} {operation.size}", "provider": name, "ms": None, "note": note}
            )
            log.error("%s %s by %s: %s", operation.name, operation.size, name, note)
        else:
            providers[name] = function
    for direction in operation.directions:
        case = f"{operation.name} {direction} {operation.size}"
        with side_stream(device):
            timings, memory, failed = time_providers(operation, providers, direction, config.seconds, device)
        rows += [{"case": case, "provider": name, "ms": None, "note": note} for name, note in failed.items()]
        for name, timing in timings.items():
            row = row_of(case, name, timing, timings, operation, direction, ceilings)
            row["memory_gb"] = memory[name]
            rows.append(row)
            log.info(
                "%-46s %-14s %9.4f ms  %6.1f %% of the ceiling  %s",
                case, row["provider"], row["ms"], 100 * row["share_of_ceiling"], ratio(row),
            )  # fmt: skip
    return rows


def time_providers(
    operation: Operation, providers: dict[str, Function], direction: str, seconds: float, device
) -> tuple[dict[str, Timing], dict[str, float | None], dict[str, str]]:
    """Timings of the providers that run, interleaved, the gigabytes that a call of each allocates, and what
    the others failed with.
    """
    size = sum(t.numel() * t.element_size() for t in operation.tensors())
    sets = min(8, buffer_sets(size, device))
    calls: dict[str, Callable[[int], object]] = {}
    memory: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for name, function in providers.items():
        try:
            call = prepared(operation, function, direction, sets)
            call(0)  # compiles
            memory[name] = memory_of(call, device)
            calls[name] = call
        except Exception as error:  # whatever a provider throws is its row
            failed[name] = does_not_run(error)
            log.error("%s %s by %s: %s", operation.name, operation.size, name, failed[name])
    try:
        return (measure(calls, device, sets=sets, seconds=seconds) if calls else {}), memory, failed
    except torch.OutOfMemoryError:  # each ran alone, but their inputs do not fit together
        return {}, memory, failed | dict.fromkeys(calls, "out of memory beside the others; lower --rows")


def memory_of(call: Callable[[int], object], device) -> float | None:
    """Gigabytes that a call allocates at most, beyond what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def prepared(operation: Operation, function: Function, direction: str, sets: int) -> Callable[[int], object]:
    """A call on buffer set i: the forward pass alone, the backward pass alone, or both."""
    inputs = [operation.tensors() for _ in range(sets)]
    if direction == "forward":

        def forward(i: int) -> Tensor:
            with torch.no_grad():
                return function(*inputs[i])

        return forward
    leaves = [[t.requires_grad_() for t in tensors[: operation.differentiable]] for tensors in inputs]
    outputs = [as_tuple(function(*tensors)) for tensors in inputs]
    grads = [[torch.randn_like(output) for output in some] for some in outputs]
    if direction == "backward":
        return lambda i: torch.autograd.grad(outputs[i], leaves[i], grads[i], retain_graph=True)
    return lambda i: torch.autograd.grad(as_tuple(function(*inputs[i])), leaves[i], grads[i])


def as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def outcome(operation: Operation, function: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs and the gradients, for output gradients that are the same whoever computes them."""
    inputs = [t.detach().clone().requires_grad_(i < operation.differentiable) for i, t in enumerate(tensors)]
    outputs = as_tuple(function(*inputs))
    found = [output.detach() for output in outputs]
    if not operation.differentiable:
        return found
    generator = torch.Generator(found[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    return [*found, *torch.autograd.grad(outputs, inputs[: operation.differentiable], grads)]


def errors(operation: Operation, function: Function, tensors: tuple[Tensor, ...]) -> list[float]:
    """Relative distance of the output and each gradient from the reference in float64."""
    exact = outcome(
        operation, operation.reference, tuple(t.double() if t.is_floating_point() else t for t in tensors)
    )
    found = outcome(operation, function, tensors)
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(found, exact, strict=True)
    ]


def checked_tensors(operation: Operation) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return operation.tensors()


def allowed_error(operation: Operation) -> list[float]:
    """What a provider may be off, for the output and each gradient."""
    tensors = checked_tensors(operation)
    floor = SMALLEST_ERROR[tensors[0].dtype]
    return [max(floor, ERROR_FACTOR * e) for e in errors(operation, operation.reference, tensors)]


def fault(operation: Operation, function: Function, limit: list[float]) -> str:
    """Why a provider cannot be timed, or nothing."""
    try:
        found = errors(operation, function, checked_tensors(operation))
    except Exception as error:  # whatever a provider throws is its row
        return does_not_run(error)
    for i, (error, most) in enumerate(zip(found, limit, strict=True)):
        if not error <= most:
            what = "gradient" if i >= len(found) - operation.differentiable else "output"
            return f"WRONG: its {what} is off by {error:.2g}, allowed {most:.2g}"
    return ""


def costs(operation: Operation, direction: str) -> tuple[float, float]:
    """The bytes that a direction must move, and its FLOPs."""
    part = {"forward": slice(0, 1), "backward": slice(1, 2), "both": slice(0, 2)}[direction]
    return sum(operation.bytes[part]), sum(operation.flops[part])


def does_not_run(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"does not run: {' '.join(str(error).split())[:120] or type(error).__name__}"


def row_of(
    case: str, name: str, timing: Timing, all_of: dict[str, Timing], operation: Operation, direction: str,
    ceilings: Ceilings,
) -> dict:  # fmt: skip
    """One line of the results: time, rate, share of the measured ceiling, and ratio to the best other
    provider.
    """
    moved, flops = costs(operation, direction)
    others = [t.median for other, t in all_of.items() if other != name]
    row = {
        "case": case,
        "provider": name,
        "ms": 1e3 * timing.median,
        "ms_low": 1e3 * timing.low,
        "ms_high": 1e3 * timing.high,
        "tb_per_s": moved / timing.median / 1e12 if moved else None,
        "tflops": flops / timing.median / 1e12 if flops else None,
        "share_of_ceiling": (moved / ceilings.copy if moved else flops / ceilings.product) / timing.median,
        "best_other_over_this": min(others) / timing.median if others else None,
    }
    return row


def is_fault(row: dict) -> bool:
    """Whether a row says that our kernel is wrong or does not run."""
    note = row.get("note", "")
    return row["provider"] == "hotlap" and ("WRONG" in note or "does not run" in note)


def ratio(row: dict) -> str:
    best = row["best_other_over_this"]
    return "" if best is None else f"{best:.2f}x the best other"

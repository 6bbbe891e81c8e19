"""`hotlap bench kernels`: check, then time, every operation by every installed provider.

A provider may hang or corrupt the GPU context. So the results name each provider before it starts, a watchdog
kills the process if it takes too long, and --resume continues with the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hotlap.bench import plots, results
from hotlap.bench.accuracy import as_tuple, is_plain_torch, mistake, right_answer
from hotlap.bench.cases import FAILED, NO_TIME, Budget, compiled_or_failed, failure, start_afresh
from hotlap.bench.config import KernelsConfig
from hotlap.bench.operations import operations
from hotlap.bench.providers import Function, Operation
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.common.timing import Timing, buffer_sets, measure, side_stream
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.kernels.peaks import Ceilings, measure_ceilings

UNFINISHED = "did not finish: it hung, or its process was killed"  # the note of a row
PLAIN = "plain torch: there is no kernel of ours for this on this device"
ALL = "all"  # in place of a provider: the reference, or all providers in turns
LONGEST = 150  # seconds, at most, to compile and check one provider, or to time all of them


class DeviceLost(OSError):
    """A kernel left the GPU context unusable, so this process cannot measure anything else."""


def bench_kernels(config: KernelsConfig) -> list[dict]:
    """Measure everything, write kernels.json, .csv and .png, and return the rows.

    A provider that is wrong or fails is not timed and has a row that says so. Raises DeviceLost if a provider
    leaves the GPU unusable.
    """
    config.validate()
    budget, device = Budget(config.minutes), default_device()
    count = config.rows or (16384 if device.type == "cuda" else 1024)
    todo = operations(count, device, fast_dtype(device.type), config.operations, config.sizes)
    path = results.open_file("kernels", config.out, device, keep=config.resume)
    before = results.load(path, device)["rows"] if path.exists() else []
    log_warnings(device)
    ceilings = measure_ceilings(device)
    log.info("measured ceilings: copy %.4g TB/s, matmul %.4g TFLOP/s", *ceilings.in_tera())
    run = Run(path, device, ceilings, [row for row in before if row.get("note") != NO_TIME])
    for operation in todo:
        if run.holds(operation):
            continue
        if budget.fits():
            bench_operation(operation, run, config)
        else:
            run.add(operation.case(), "hotlap", NO_TIME)
        run.save()
    run.save(complete=True)
    plots.draw(path, plots.kernels)
    log.info("written to %s", path)
    return run.rows


class Run:
    """The rows of a run, saved before and after everything that may hang or kill the process."""

    def __init__(self, path: Path, device: torch.device, ceilings: Ceilings, rows: list[dict]):
        """rows: from an earlier run, to resume."""
        self.path, self.device, self.ceilings, self.rows = path, device, ceilings, rows

    def save(self, *more: dict, complete: bool = False) -> None:
        rows = [*self.rows, *more]
        results.save(self.path, rows, self.device, ceilings=vars(self.ceilings), complete=complete)

    def add(self, case: str, provider: str, note: str) -> None:
        """Add a row without a time; note: the reason."""
        self.rows.append({"case": case, "provider": provider, "ms": None, "note": note})

    def holds(self, operation: Operation) -> bool:
        """Whether an operation has been measured, or cannot be."""
        last, whole = operation.case(operation.directions[-1]), operation.case()
        return any(row["case"] == last or (row["case"], row["provider"]) == (whole, ALL) for row in self.rows)

    def failed(self, operation: Operation) -> set[str]:
        """The providers of an operation that were wrong, failed or hung."""
        return {row["provider"] for row in self.rows if row["case"] == operation.case()}

    def begin(self, operation: Operation, provider: str) -> None:
        """Record what is about to run, to blame it if this process dies."""
        self.save({"case": operation.case(), "provider": provider, "ms": None, "note": UNFINISHED})

    def attempt(self, operation: Operation, provider: str, direction: str, action: Callable[[], Any]) -> Any:
        """Run an action of a provider and return its result. If it raises, add a row and return None."""
        try:
            with watched(self.device):
                return action()
        except Exception as error:  # any error of a provider is its row
            note, lost = failure(error), not is_usable(self.device)
            results.write_traceback(self.path.parent, f"{operation.case(direction)} by {provider}")
            log.error("%s by %s: %s", operation.case(direction), provider, note)
            self.add(operation.case("" if lost else direction), provider, note)
            if lost:
                self.save()
                raise DeviceLost(
                    f"{provider} left the GPU unusable in {operation.case()}; continue with --resume"
                ) from error
        return None


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[None]:
    """On a GPU, dump the stacks and kill the process if the action hangs."""
    if device.type != "cuda":
        yield
        return
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_usable(device: torch.device) -> bool:
    """Whether the GPU still works, as it may not after an illegal access or a failed graph capture."""
    try:
        return torch.randn(1, device=device).isfinite().item()
    except RuntimeError:
        return False


@compiled_or_failed(donated_buffer=False)  # else a compiled backward pass runs only once
def bench_operation(operation: Operation, run: Run, config: KernelsConfig) -> None:
    """Add the rows of one operation, for each direction and each provider that has not failed before."""
    start_afresh(run.device)
    directions = {operation.case(direction): direction for direction in operation.directions}
    run.rows = [row for row in run.rows if row["case"] not in directions]  # of an unfinished run
    names = [name for name in operation.providers if name not in run.failed(operation)]
    if not config.compile:
        names = [name for name in names if name != "compile"]
    run.begin(operation, ALL)
    right = run.attempt(operation, ALL, "", partial(right_answer, operation, run.device))
    if right is None:
        return
    good = []
    for name in names:
        run.begin(operation, name)
        note = run.attempt(operation, name, "", partial(mistake, right, name))
        if note:
            log.error("%s by %s: %s", operation.case(), name, note)
            run.add(operation.case(), name, note)
        elif note is not None:
            good.append(name)
    if "hotlap" in good and is_plain_torch(right, "hotlap"):
        good.remove("hotlap")
        run.add(operation.case(), "hotlap", PLAIN)
    del right
    sets = run.attempt(operation, ALL, "", partial(needed_sets, operation, run.device)) if good else None
    for case, direction in directions.items() if sets else ():
        run.begin(operation, ALL)
        with side_stream(run.device):
            timed = time_providers(operation, good, direction, sets, config.seconds, run)
        for name, (timing, memory) in timed.items():
            row = row_of(name, operation, direction, {n: t for n, (t, _) in timed.items()}, run.ceilings)
            run.rows.append(row | {"memory_gb": memory, "graph": None if memory is None else timing.graph})
            log.info(
                "%-46s %-14s %9.4f ms  %6.1f %% of ceiling  %s",
                case, row["provider"], row["ms"], 100 * row["share_of_ceiling"], ratio(row),
            )  # fmt: skip


def time_providers(
    operation: Operation, names: list[str], direction: str, sets: int, seconds: float, run: Run
) -> dict[str, tuple[Timing, float | None]]:
    """Time the providers that run, interleaved: each one's timing, and the gigabytes a call allocates."""
    calls: dict[str, Callable[[int], object]] = {}
    memory: dict[str, float | None] = {}

    def first_call(name: str) -> Callable[[int], object]:
        call = prepared(operation, operation.providers[name], direction, sets)
        call(0)  # compiles
        memory[name] = memory_of(call, run.device)
        return call

    for name in names:
        if call := run.attempt(operation, name, direction, partial(first_call, name)):
            calls[name] = call
    timings = {}
    if calls:  # each runs alone, but they may not fit in memory together
        action = partial(measure, calls, run.device, sets=sets, seconds=seconds)
        timings = run.attempt(operation, ALL, direction, action) or {}
    return {name: (timing, memory[name]) for name, timing in timings.items()}


def needed_sets(operation: Operation, device: torch.device) -> int:
    """How many sets of inputs exceed the cache."""
    return buffer_sets(sum(t.nbytes for t in operation.tensors()), device)


def memory_of(call: Callable[[int], object], device: torch.device) -> float | None:
    """Peak gigabytes that a call allocates; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def prepared(operation: Operation, function: Function, direction: str, sets: int) -> Callable[[int], object]:
    """A call on buffer set i: the forward pass, the backward pass, or both.

    Results are held until the set's next turn, so that they rotate over memory like the inputs.
    """
    inputs = [operation.tensors() for _ in range(sets)]
    held: list[object] = [None] * sets
    if direction == "forward":

        def forward(i: int) -> None:
            with torch.no_grad():
                held[i] = function(*inputs[i])

        return forward
    leaves = [[t.requires_grad_() for t in tensors[: operation.differentiable]] for tensors in inputs]
    if direction == "both":

        def both(i: int) -> None:
            outputs = as_tuple(function(*inputs[i]))
            held[i] = torch.autograd.grad(outputs, leaves[i], grads[i])

        first = as_tuple(function(*inputs[0]))
        grads = [[torch.randn_like(output) for output in first] for _ in range(sets)]
        return both
    outputs = [as_tuple(function(*tensors)) for tensors in inputs]
    grads = [[torch.randn_like(output) for output in first] for first in outputs]

    def backward(i: int) -> None:
        held[i] = torch.autograd.grad(outputs[i], leaves[i], grads[i], retain_graph=True)

    return backward


def costs(operation: Operation, direction: str) -> tuple[float, float]:
    """The bytes that a direction must move, and its FLOPs."""
    part = {"forward": slice(0, 1), "backward": slice(1, 2), "both": slice(0, 2)}[direction]
    return sum(operation.bytes[part]), sum(operation.flops[part])


def row_of(
    name: str, operation: Operation, direction: str, timings: dict[str, Timing], ceilings: Ceilings
) -> dict:
    """A row: time, rate, share of the measured ceiling, and ratio to the best other provider."""
    timing = timings[name]
    moved, flops = costs(operation, direction)
    others = [t.median for other, t in timings.items() if other != name]
    return {
        "case": operation.case(direction),
        "provider": name,
        "ms": 1e3 * timing.median,
        "ms_low": 1e3 * timing.low,
        "ms_high": 1e3 * timing.high,
        "tb_per_s": moved / timing.median / 1e12 if moved else None,
        "tflops": flops / timing.median / 1e12 if flops else None,
        "share_of_ceiling": (moved / ceilings.copy if moved else flops / ceilings.matmul) / timing.median,
        "best_other_over_this": min(others) / timing.median if others else None,
    }


def is_fault(row: dict) -> bool:
    """Whether a row says that our code is wrong or does not run."""
    ours = row["provider"] == ALL or row["provider"].startswith("hotlap")
    return ours and row.get("note", "").startswith(("WRONG", FAILED, UNFINISHED))


def ratio(row: dict) -> str:
    best = row["best_other_over_this"]
    return "" if best is None else f"{best:.2f}x as fast as the best other"


def main(config: KernelsConfig) -> int:
    """`hotlap bench kernels`; exit code 1 if one of our kernels failed or was wrong."""
    rows = bench_kernels(config)
    return int(any(map(is_fault, rows)))

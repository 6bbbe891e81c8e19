"""Reliable timing: warm, on data outside the caches, interleaved, and with its spread.

On a GPU, blocks of calls are captured as a CUDA graph and timed by device events, which leaves out host
overhead; on a CPU, the host's clock is used. Variants take turns, in alternating order, so that drift
(clocks, temperature, other users) affects all of them equally.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hotlap.common.gpu import captured
from hotlap.common.log import log

Call = Callable[[int], object]  # call(i) uses buffer set i
Clock = Callable[[], float]  # seconds

BLOCK_SECONDS = 2e-3  # shortest block to time, far above the clocks' resolution
WARM_UP_SECONDS = 0.05
FEWEST_SAMPLES = 5
CACHE_FACTOR = 2.5  # size of all buffer sets, as a multiple of the last-level cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and their 10 % and 90 % quantiles."""

    median: float
    low: float
    high: float
    samples: int
    graph: bool = False  # from a CUDA graph, so without host overhead

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
        )


def buffer_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate over, so that none is still cached when its turn comes."""
    cache = 32 << 20
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, int(CACHE_FACTOR * cache / max(1, bytes_of_one)) + 1))


def measure(
    variants: dict[str, Call],
    device: torch.device,
    *,
    sets: int = 1,
    seconds: float = 0.3,
    capture: bool = True,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time each variant for about `seconds`, interleaved. A variant is called with the index of a buffer set.

    capture: time a CUDA graph of the calls; not for calls that wait for the GPU, such as whole training
    steps. clock: of a CPU. Raises what a variant raises.
    """
    with side_stream(device) if capture else contextlib.nullcontext():
        blocks = {name: _block(name, call, device, sets, capture, clock) for name, call in variants.items()}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        began, order = time.perf_counter(), list(variants)
        while (
            time.perf_counter() - began < seconds * len(variants) or len(samples[order[0]]) < FEWEST_SAMPLES
        ):
            for name in order:
                samples[name].append(blocks[name].seconds())
            order.reverse()
    return {name: replace(Timing.of(values), graph=blocks[name].graph) for name, values in samples.items()}


class Block(NamedTuple):
    """The calls that are timed together."""

    seconds: Callable[[], float]  # runs them, and returns the seconds per call
    graph: bool = False


def _block(name: str, call: Call, device: torch.device, sets: int, capture: bool, clock: Clock) -> Block:
    synchronize(device)
    began, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < WARM_UP_SECONDS:
        call(calls % sets)
        calls += 1
        synchronize(device)
    one = (time.perf_counter() - began) / calls
    count = max(1, min(1000, round(BLOCK_SECONDS / one)))
    count = -(-count // sets) * sets if count > 1 else 1  # a multiple of the buffer sets
    if device.type != "cuda":
        return Block(lambda: _host_seconds(call, count, sets, clock))
    return _device_block(name, call, max(count, sets), sets, capture)


def _host_seconds(call: Call, count: int, sets: int, clock: Clock) -> float:
    began = clock()
    for i in range(count):
        call(i % sets)
    return (clock() - began) / count


def _device_block(name: str, call: Call, count: int, sets: int, capture: bool) -> Block:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def calls() -> None:
        for i in range(count):
            call(i % sets)

    graph = _captured(name, call, calls) if capture else None
    run = graph.replay if graph else calls

    def seconds(times: int) -> float:
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times / count

    seconds(1)  # the first replay uploads the graph
    # `count` comes from the host's clock, which includes launches. A graph of as many calls takes less time,
    # so it is replayed until its own launch no longer matters.
    times = max(1, min(100, round(BLOCK_SECONDS / max(1e-9, count * seconds(1)))))
    return Block(lambda: seconds(times), graph is not None)


def _captured(name: str, call: Call, calls: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of the calls, already warm on the current stream. None if there can be none, which is
    logged with its reason.
    """
    if why := _waits_for_gpu(call):
        log.info("%s is timed with host overhead, without a CUDA graph: %s", name, why)
        return None
    try:
        return captured(calls, stream=torch.cuda.current_stream())[0]
    except RuntimeError as error:
        log.warning("%s is timed without a CUDA graph: capture failed: %s", name, str(error).splitlines()[0])
        return None


def _waits_for_gpu(call: Call) -> str:
    """Why a call cannot be captured, because it waits for the GPU; empty if it does not. Checked beforehand,
    because a failed capture leaves torch's random generator and streams unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, use a side stream. Graphs cannot be captured on the default stream, and a backward pass runs
    on the stream of its forward pass.
    """
    if device.type != "cuda":
        yield
        return
    outside, inside = torch.cuda.current_stream(device), _stream(device)
    inside.wait_stream(outside)
    with torch.cuda.stream(inside):
        yield
    outside.wait_stream(inside)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Timing that can be believed: warm, on fresh data, interleaved, and with its spread.

On a GPU, blocks of calls are captured as a CUDA graph and timed by device events, so that the host's share is
left out; on a CPU by the host's clock. Variants take turns, forwards and backwards, so that what drifts
(clocks, temperature, other users) falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

log = logging.getLogger("hotlap")

Call = Callable[[int], object]  # a call on buffer set i

BLOCK_SECONDS = 2e-3  # the least that is timed at once, far above the clocks' resolution
WARM_UP_SECONDS = 0.05
FEWEST_SAMPLES = 5
NO_TIME = "skipped: no time left"  # the note of a row that was not measured
CACHE_FACTOR = 2.5  # how far the rotating buffers exceed the last-level cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and the quantiles that 10 % lie below and above."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
        )


def buffer_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate over, so that none is still in the cache when its turn comes."""
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
) -> dict[str, Timing]:
    """Time each variant for about `seconds`, all interleaved. A variant is called with the number of a buffer
    set.

    capture: whether to time a CUDA graph of the calls; not for what waits for the GPU, such as whole training
    steps. Raises what a variant raises; one that does not run should not be in here.
    """
    with side_stream(device) if capture else contextlib.nullcontext():
        blocks = {name: _block(call, device, sets, capture) for name, call in variants.items()}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        began, order = time.perf_counter(), list(variants)
        while (
            time.perf_counter() - began < seconds * len(variants) or len(samples[order[0]]) < FEWEST_SAMPLES
        ):
            for name in order:
                samples[name].append(blocks[name]())
            order.reverse()
    return {name: Timing.of(values) for name, values in samples.items()}


def _block(call: Call, device: torch.device, sets: int, capture: bool) -> Callable[[], float]:
    """A function that runs the call as often as fills a block, and returns the seconds of one."""
    synchronize(device)
    began, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < WARM_UP_SECONDS:
        call(calls % sets)
        calls += 1
        synchronize(device)
    one = (time.perf_counter() - began) / calls
    count = max(1, min(1000, round(BLOCK_SECONDS / one)))
    count = -(-count // sets) * sets if count > 1 else 1  # whole rounds of the buffer sets
    if device.type != "cuda":
        return lambda: _host_seconds(call, count, sets)
    return _device_block(call, max(count, sets), sets, capture)


def _host_seconds(call: Call, count: int, sets: int) -> float:
    began = time.perf_counter()
    for i in range(count):
        call(i % sets)
    return (time.perf_counter() - began) / count


def _device_block(call: Call, count: int, sets: int, capture: bool) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        for i in range(count):
            call(i % sets)

    if capture and (why := _waits_for_gpu(call)):
        log.info("timed with the host's share, without a CUDA graph: %s", why)
    elif capture:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=stream):
                run()
            run = graph.replay
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch forgets to, where a capture fails
            log.warning("a CUDA graph cannot be captured: %s", str(error).splitlines()[0])

    def block() -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    block()
    return block


def _waits_for_gpu(call: Call) -> str:
    """Where a call waits for the GPU, so that no graph can hold it, or nothing. Asked beforehand, because a
    capture that fails leaves torch's random numbers and streams unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, work on a stream of its own. Graphs cannot be captured on the default stream, and a backward
    pass runs on the stream of its forward pass.
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


def deadline(minutes: float) -> float:
    """When so many minutes are over, on the clock of time.monotonic; 0 minutes never are."""
    if not 0 <= minutes < math.inf:
        raise ValueError(f"minutes={minutes} must be 0 (no limit) or more")
    return time.monotonic() + 60 * minutes if minutes else math.inf


def start_afresh(device: torch.device) -> None:
    """Forget what was compiled, which would count towards the compiler's limit for each function, and free
    memory.
    """
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""How a GPU is timed, on one that only pretends: what it would do is added up on a clock."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from hotlap.bench.cases import Stopwatch
from hotlap.common import timing
from hotlap.common.timing import measure

GPU = torch.device("cuda")
LAUNCH, KERNEL = 20e-6, 10e-6  # seconds


class FakeGPU:
    """A clock of the work that is given to a GPU. A launch takes the host longer than the GPU."""

    def __init__(self):
        self.now, self.capturing, self.mode, self.fails = 0.0, None, 0, False
        self.captures, self.stream = 0, "default"

    def launch(self, seconds: float) -> None:
        if self.capturing is None:
            self.now += LAUNCH + seconds
        else:
            self.capturing.append(seconds)

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        assert self.capturing is None

    def install(self, monkeypatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        class Graph:
            def __init__(self):
                self.nodes = []

            def replay(self):
                gpu.now += LAUNCH + sum(self.nodes)

        @contextlib.contextmanager
        def capture(graph, stream):
            gpu.captures += 1
            assert gpu.capturing is None and stream == gpu.stream == "side"
            gpu.capturing = graph.nodes
            try:
                yield
            finally:
                gpu.capturing = None
            if gpu.fails and graph.nodes:
                gpu.stream = "lost"
                raise RuntimeError("operation failed due to a previous error during capture\nand more")

        @contextlib.contextmanager
        def on_stream(stream):
            before, gpu.stream = gpu.stream, stream
            yield
            gpu.stream = before

        monkeypatch.setattr(
            timing, "_stream", lambda device: types.SimpleNamespace(wait_stream=lambda other: None)
        )
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "stream": lambda stream: on_stream("side"),
            "set_stream": lambda stream: setattr(gpu, "stream", stream),
            "current_stream": lambda *_: FakeStream(gpu.stream),
            "synchronize": lambda *_: None,
            "get_sync_debug_mode": lambda: gpu.mode,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


class FakeStream(str):
    def wait_stream(self, other):
        pass


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGPU()
    fake.install(monkeypatch)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 2e-3)
    return fake


def test_short_kernels_are_timed_without_their_launches(gpu):
    sets = []

    def call(i):
        sets.append(i)
        gpu.launch(KERNEL)

    found = measure({"short": call}, GPU, sets=3, seconds=0.001)["short"]
    assert found.graph and KERNEL <= found.median < 1.1 * KERNEL
    assert set(sets) == {0, 1, 2} and gpu.captures == 1 and gpu.mode == 0 and gpu.stream == "default"


def test_long_calls_are_timed_too(gpu):
    found = measure({"long": lambda _: gpu.launch(0.1)}, GPU, sets=2, seconds=0.001)["long"]
    assert found.graph and found.median == pytest.approx(0.1, rel=1e-3)


def test_what_waits_for_the_gpu_is_timed_with_the_hosts_share_and_said(gpu, caplog):
    def waits(_):
        gpu.launch(KERNEL)
        gpu.wait()

    found = measure({"waits": waits}, GPU, seconds=0.001)["waits"]
    assert not found.graph and found.median == pytest.approx(LAUNCH + KERNEL)
    assert "waits is timed with host overhead" in caplog.text and gpu.captures == 0 and gpu.mode == 0


def test_a_capture_that_fails_is_said_and_leaves_the_stream_and_no_capture_behind(gpu, caplog):
    gpu.fails = True
    found = measure({"odd": lambda _: gpu.launch(KERNEL)}, GPU, seconds=0.001)["odd"]
    assert not found.graph and found.median == pytest.approx(LAUNCH + KERNEL)
    assert "odd is timed without a CUDA graph: capture failed: operation failed" in caplog.text
    assert gpu.captures == 2 and gpu.stream == "default"  # the second is empty, and ends well


def test_running_out_of_memory_is_not_taken_for_waiting(gpu):
    def greedy(_):
        if gpu.mode == "error":
            raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        measure({"greedy": greedy}, GPU, seconds=0.001)


def test_marks_are_read_at_the_end(gpu):
    watch = Stopwatch(GPU)
    for seconds in (0.1, 0.2):
        gpu.launch(seconds)
        watch.mark()
    assert watch.seconds() == pytest.approx([0.1 + LAUNCH, 0.2 + LAUNCH])

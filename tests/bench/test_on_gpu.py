"""Timing and the state of a real GPU."""

import pytest
import torch

from hotlap.bench.kernels import memory_of, prepared
from hotlap.bench.operations import operations
from hotlap.common.machine import device_state
from hotlap.common.timing import measure, side_stream
from hotlap.kernels.peaks import measure_ceilings
from hotlap.model.flops import peak_flops

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def test_calls_are_timed_as_replays_of_a_graph():
    total, called = torch.zeros((), device=GPU), 0

    def call(_):
        nonlocal called
        called += 1
        total.add_(1)

    measure({"add": call}, GPU, seconds=0.01)
    assert total.item() > called


def test_a_call_that_waits_for_the_gpu_is_timed_without_a_graph_and_spoils_nothing():
    x = torch.ones(1000, device=GPU)
    assert measure({"waits": lambda _: x.sum().item()}, GPU, seconds=0.01)["waits"].median > 0
    torch.randn(3, device=GPU)  # fails after a capture that failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("name", ["rms_norm", "relu2", "attention_inputs", "cross_entropy"])
def test_every_direction_is_captured(name, caplog):
    operation = next(operations(256, GPU, torch.bfloat16, (name,)))
    with side_stream(GPU):
        calls = {d: prepared(operation, operation.providers["hotlap"], d, 2) for d in operation.directions}
        measure(calls, GPU, sets=2, seconds=0.01)
    assert [r.getMessage() for r in caplog.records if "graph" in r.getMessage()] == []


def test_the_memory_of_a_call_is_what_it_allocates():
    assert memory_of(lambda _: torch.empty(1 << 24, device=GPU), GPU) == pytest.approx((1 << 26) / 1e9)


def test_no_ceiling_is_beyond_what_paper_allows():
    found = measure_ceilings(GPU)  # beyond, the work was not done
    assert 0 < found.matmul < 1.3 * (peak_flops(GPU) or float("inf"))
    assert 0 < found.copy < 1e13  # more than the 8 TB/s of a B200


def test_the_state_of_the_gpu_is_read():
    pytest.importorskip("pynvml")
    state, warnings = device_state(GPU)
    assert all(isinstance(warning, str) for warning in warnings)
    if state:  # not on AMD's, nor where the driver does not let us
        assert 0 < state["sm_clock_mhz"] <= state["sm_clock_max_mhz"]
        assert 0 < state["temperature_c"] < 120 and state["power_cap_w"] > 0

"""The cases of `hotlap bench kernels` under pytest-benchmark, whose --benchmark-compare tracks them:

pytest bench --benchmark-only
"""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("pytest_benchmark")

from hotlap.bench.kernels import costs, needed_sets, prepared
from hotlap.bench.operations import operations
from hotlap.common.timing import synchronize
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.kernels.peaks import measure_ceilings

DEVICE = default_device()
ROWS = 16384 if DEVICE.type == "cuda" else 256
CASES = [
    pytest.param(operation, direction, id=f"{operation.name} {direction} {operation.size}")
    for operation in operations(ROWS, DEVICE, fast_dtype(DEVICE.type), ())
    for direction in operation.directions
]


@pytest.fixture(scope="module")
def ceilings():
    return measure_ceilings(DEVICE)


@pytest.mark.parametrize(("operation", "direction"), CASES)
def test_ours(operation, direction, benchmark, ceilings):
    sets = needed_sets(operation, DEVICE)
    call = prepared(operation, operation.providers["hotlap"], direction, sets)
    turns = itertools.cycle(range(sets))

    def once() -> None:
        call(next(turns))
        synchronize(DEVICE)

    benchmark(once)
    moved, flops = costs(operation, direction)
    limit, seconds = moved / ceilings.copy + flops / ceilings.matmul, benchmark.stats["median"]
    benchmark.extra_info |= {
        "tb_per_s": moved / seconds / 1e12,
        "tflops": flops / seconds / 1e12,
        "share_of_ceiling": limit / seconds,
    }

"""The interpreter that runs kernels without a GPU, as tests change it, finds integers that overflow."""

import pytest
import torch

from hotlap.kernels.dispatch import INTERPRETED, jit, tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
LARGEST = 2**31 - 1
OVERFLOWS = [("+", LARGEST, 1), ("-", -LARGEST, 2), ("*", 2**16, 2**15)]


@jit
def _combine(a, b, OPERATION: tl.constexpr):
    return a + b if OPERATION == "+" else a - b if OPERATION == "-" else a * b


@jit
def _combine_kernel(a, b, c, OPERATION: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(c + i, _combine(tl.load(a + i), tl.load(b + i), OPERATION))


def combine(operation: str, a: list[int], b: list[int], dtype: torch.dtype) -> list[int]:
    a, b = torch.tensor([a, b], dtype=dtype)
    c = torch.empty_like(a)
    _combine_kernel[(1,)](a, b, c, OPERATION=operation)
    return c.tolist()


@pytest.mark.parametrize("operation, a, b", OVERFLOWS)
def test_int32_that_overflows_ends_a_kernel(operation, a, b):
    with pytest.raises(Exception, match="overflows"):
        combine(operation, [0, 0, 0, a], [0, 0, 0, b], torch.int32)


@pytest.mark.parametrize("operation, a, b", OVERFLOWS)
def test_what_fits_is_computed(operation, a, b):
    exact = {"+": a + b, "-": a - b, "*": a * b}[operation]
    assert combine(operation, [0, 0, 0, a], [0, 0, 0, b], torch.int64) == [0, 0, 0, exact]


def test_the_largest_and_smallest_int32_are_computed():
    assert combine("+", [LARGEST - 1] * 4, [1] * 4, torch.int32) == [LARGEST] * 4
    assert combine("-", [-LARGEST] * 4, [1] * 4, torch.int32) == [-LARGEST - 1] * 4

import pytest
import torch
import torch._dynamo.trace_rules

from hotlap.bench.accuracy import poisoned_memory
from hotlap.kernels import dispatch, tiles

if dispatch.INTERPRETED:
    from helpers import interpreter

    interpreter.mend()
    interpreter.hasten()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of measured tiles, with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (tiles.pick_tile, tiles.tuned):
        function.cache_clear()
    yield tmp_path
    for function in (tiles.pick_tile, tiles.tuned):
        function.cache_clear()


@pytest.fixture(autouse=True)
def share_the_memory():
    """What a test took of a GPU is there for the tests of other processes."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


def let_torch_note_its_functions() -> None:
    """Before one of them is replaced."""
    with torch.device("cpu"):  # at its first use torch notes, for good, which functions it has to watch
        torch.empty(0)
    # and compilers, which functions are torch's, until a process group is destroyed
    torch._dynamo.trace_rules.get_torch_obj_rule_map()


@pytest.fixture
def triton_kernels(choose_kernels):
    """Run the Triton kernels, on memory that holds NaN before it is written."""
    if dispatch.triton is None:
        pytest.skip("needs Triton")
    choose_kernels("triton")
    let_torch_note_its_functions()
    with poisoned_memory():
        yield


@pytest.fixture
def c_kernels(choose_kernels):
    """Run the kernels in C, on memory that holds NaN before it is written."""
    if torch.cuda.is_available():
        pytest.skip("of CPUs")
    choose_kernels("c")
    let_torch_note_its_functions()
    with poisoned_memory():
        yield


@pytest.fixture(params=["triton", "c"])
def triton_or_c(request):
    """Run both kinds of kernels, one after the other."""
    request.getfixturevalue(f"{request.param}_kernels")

"""`pytest -p gpu_stand_in.plugin`, with tests/ on PYTHONPATH: tests on a GPU that is not there.

STAND_IN=launches: tensors are on the CPU, and eager code launches kernels. Nothing is computed, so
comparisons in the kernels' own tests may fail. STAND_IN=torch: torch believes in the GPU too, and cudart.c is
preloaded.

A test fails by an exception, and by what a kernel that it launched or compiled should not do.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import pytest

WHOLE = os.environ["STAND_IN"] == "torch"
if WHOLE:
    from gpu_stand_in import torch_gpu

    torch_gpu.install()

from gpu_stand_in import triton_gpu

triton_gpu.install(on_cpu=not WHOLE)
import torch
from gpu_stand_in import codegen

from hotlap.bench.static import SPILL

codegen.install(codegen.inductor if WHOLE else codegen.graphs)
seen = triton_gpu.seen
torch.library.opcheck = seen.graph(torch.library.opcheck)  # which traces operations, and runs their graphs
empty = torch.empty


def written(*size, **options):
    """torch.empty, of memory that a kernel has written, the same each time."""
    x = empty(*size, **options)
    x.detach().zero_()
    return x


def of_kernels(item) -> bool:
    return item.path.parent.name == "kernels"


def launches(item) -> bool:
    """Whether a test of the kernels runs them: it asks for them, or is one of both paths, and not torch's."""
    chosen = item.callspec.params if hasattr(item, "callspec") else {}
    return "triton_kernels" in item.fixturenames or "triton" in (
        chosen.get("kernels"),
        chosen.get("triton_or_c"),
    )


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if of_kernels(item) and not launches(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    wrapped = len(seen.wrapped)
    with pytest.MonkeyPatch.context() as patch:
        if of_kernels(item):
            patch.setattr(torch, "empty", written)
        try:
            yield
        except Exception as error:  # opcheck's own, where it compares
            if not (of_kernels(item) and isinstance(error.__cause__ or error, AssertionError)):
                raise
    names = sorted({name for name, within in seen.wrapped[wrapped:] if within or not of_kernels(item)})
    assert not names, f"eager code launched {', '.join(names)} by torch's operator for kernels"
    spilled = [str(kernel) for kernel in seen.new() if kernel.spilled > SPILL and kernel.usual]
    assert not spilled, "a default tile spills:\n" + "\n".join(spilled)

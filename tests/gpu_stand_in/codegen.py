"""Backends of torch.compile for a GPU that is not there. Both take no graph break.

`inductor` has Inductor generate and compile its code, which would allocate memory on the GPU, and runs the
graph instead, on FakeTensors. `graphs` runs what Inductor would be given, on tensors of the CPU.
"""

from __future__ import annotations

import functools

import torch
from functorch.compile import make_boxed_func
from gpu_stand_in.patches import put
from gpu_stand_in.triton_gpu import seen
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import ReinplaceCounters
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

GENERATED: list[str] = []  # Inductor's code, a text for each graph
COPIED: list[str] = []  # graphs that copy a tensor before a kernel that writes it, or is believed to


def _generate(graph, inputs, **options):
    ReinplaceCounters.clear()
    compile_fx_inner(graph, inputs, **options)
    if missed := ReinplaceCounters.get_total_missed():
        which = "backward" if options.get("is_backward") else "forward"
        COPIED.append(f"{missed} tensors in a {which} graph")
    return make_boxed_func(graph.forward)


def _run(graph, inputs):
    return make_boxed_func(seen.graph(graph.forward))


inductor = functools.partial(compile_fx, inner_compile=_generate)
graphs = aot_autograd(fw_compiler=_run, bw_compiler=_run)


def install(backend) -> None:
    """torch.compile without a backend takes this one."""
    torch.compile = functools.partial(torch.compile, backend=backend, fullgraph=True)
    if backend is not inductor:
        return
    settings = {
        "compile_threads": 1,  # in this process, where the stand-in is
        "force_disable_caches": True,  # what is cached is neither generated nor looked at
        "use_static_cuda_launcher": False,  # Triton's, which the stand-in replaces, instead of Inductor's own
        "joint_graph_constant_folding": False,  # stands for: constants that are computed on the GPU
    }
    for name, value in settings.items():
        put(f"torch._inductor.config.{name}", value)
    # stands for: patterns to rewrite, such as attention in parts, for which Inductor makes tensors on the GPU
    put("torch._inductor.fx_passes.joint_graph.lazy_init", lambda *_: None)
    # stands for nothing: keeps the code
    put("torch._inductor.graph.GraphLowering.save_output_code", staticmethod(GENERATED.append))

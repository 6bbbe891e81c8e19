"""How kernels are launched on a GPU: by eager code, under dispatch modes, and in graphs of symbolic sizes.

Run by test_stand_in.py, with any build of torch. The plugin fails a test whose eager code launches a kernel
by torch's operator for kernels.
"""

import contextlib

import pytest
import torch
from gpu_stand_in import patches
from gpu_stand_in.triton_gpu import seen
from helpers.tools import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from hotlap.kernels import decode_linear
from hotlap.kernels.attention import attention
from hotlap.kernels.cross_entropy import cross_entropy
from hotlap.kernels.embedding import embedding
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.linear_relu2 import linear_relu2
from hotlap.kernels.muon import muon_momentum
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.kernels.qkv import attention_inputs
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import rms_norm, rms_norm_residual
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig

BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def launches(function) -> int:
    """How many kernels a call launches."""
    before = seen.launches
    function()
    return seen.launches - before


def total(function):
    """function, whose outputs are added up."""

    def added(*given):
        outputs = function(*given)
        return sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return added


def loss(logits):
    return cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64), 15.0)


def loss_of_head(x, head):
    return linear_cross_entropy(x, head, torch.zeros(x.shape[0], dtype=torch.int64), 15.0)


def look_up(weight):
    return embedding(torch.arange(weight.shape[0]) // 2, weight, BF16)


def attend(q, k, v):
    return attention(q, k, v, 16, backend="triton")


def project(qkv, gate, value_embedding):
    tables = (torch.ones(qkv.shape[1], 32) for _ in "cs")
    return attention_inputs(qkv, 1, *tables, 1.2, gate, value_embedding)


OPERATIONS = {  # and tensors for a number of rows
    "relu2": (relu2, lambda rows: [random(rows, 64)]),
    "rms_norm": (rms_norm, lambda rows: [random(rows, 64), random(64, dtype=torch.float32)]),
    "rms_norm_residual": (rms_norm_residual, lambda rows: [random(rows, 64), random(rows, 64)]),
    "linear_relu2": (linear_relu2, lambda rows: [random(rows, 64), random(128, 64), random(64, 128)]),
    "embedding": (look_up, lambda rows: [random(rows, 64, dtype=torch.float32)]),
    "cross_entropy": (loss, lambda rows: [random(rows, 640)]),
    "linear_cross_entropy": (loss_of_head, lambda rows: [random(rows, 64), random(640, 64)]),  # opaque
    "attention_inputs": (
        project,
        lambda rows: [random(1, rows, 4, 64), random(1, rows, 1), random(1, rows, 1, 64)],
    ),
    "attention": (attend, lambda rows: [random(1, rows, 2, 64) for _ in "qkv"]),
}
# Sizes become numbers where attention's backend is chosen by the number of keys, and are compared where the
# gradient of a weight is summed by as many programs as there is work for.
RECOMPILED = {"attention", "rms_norm"}


def test_every_name_that_the_stand_in_replaces_is_there():
    assert not patches.MISSING, f"gone from their libraries: {', '.join(patches.MISSING)}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_eager_code_launches_kernels(name):
    function, tensors = OPERATIONS[name]
    assert launches(lambda: total(function)(*tensors(40)).backward()) >= 1


class Names(TorchDispatchMode):
    """Of the operations that are called in it."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_dispatch_modes_see_an_operation_and_let_it_launch(name):
    function, tensors = OPERATIONS[name]
    with Names() as mode:
        assert launches(lambda: total(function)(*tensors(40)).backward()) >= 1
    assert any(operation.startswith("hotlap.") for operation in mode.names)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_of_symbolic_sizes_launches_kernels(name):
    """One graph for all numbers of rows."""
    function, tensors = OPERATIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(total(function), dynamic=True)
    for rows in (40, 56, 88):
        once = rows > 40 and name not in RECOMPILED
        with torch._dynamo.config.patch(error_on_recompile=once):
            assert launches(lambda rows=rows: compiled(*tensors(rows)).backward()) >= 1


def test_a_model_and_its_optimizer_launch_kernels():
    model = GPT(tiny_config(), BF16).init_weights()
    optimizer = MuonAdamW(model, OptimConfig())
    ids = torch.arange(2 * 64).view(2, 64)
    assert launches(lambda: model(ids, ids, document_start=ids * 0).backward()) > 10
    assert launches(optimizer.step) > 10


@pytest.mark.parametrize("depth", [12, 24])
def test_an_update_of_a_matrix_launches_kernels(depth, monkeypatch):
    """Of the optimiser, at the width of a model. Products that are torch's would take a CPU long."""
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a.new_zeros(*a.shape[:-1], b.shape[-1]))
    width = GPTConfig.from_depth(depth).width
    grad, momentum = torch.zeros(2, 1, width, width).unbind()
    with torch.no_grad():
        update = muon_momentum(grad.unbind(), momentum, torch.tensor(0.9), BF16)
        assert launches(lambda: orthogonalize(update, norm=width**0.5)) >= 10


@pytest.mark.parametrize("how", ["eager", "mode", "compiled"])
def test_a_product_starts_early_where_no_tracer_launches_it(how, monkeypatch):
    """Tracers take no option of a launch."""
    last = lambda table, rows, device: table(rows, device)[-1]  # noqa: E731
    monkeypatch.setattr(decode_linear, "pick_tile", last)
    product, before = decode_linear.linear_residual, len(seen.loaded)
    torch._dynamo.reset()
    with torch.no_grad(), Names() if how == "mode" else contextlib.nullcontext():
        (torch.compile(product) if how == "compiled" else product)(
            *(random(*shape) for shape in ((2, 48), (80, 48), (2, 80)))
        )
    names = {kernel.name for kernel in seen.loaded[before:]}
    assert names == {f"_decode_linear{'_early' if how == 'eager' else ''}_kernel"}

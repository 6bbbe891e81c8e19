"""What the interpreter cannot show: compilers, graphs and memory of a real GPU.

Where there is one, the other tests of this folder run natively too.
"""

import pytest
import torch
from kernel_tools import DEVICE, random
from tools import tiny_config
from torch._inductor.utils import run_and_get_code

from hotlap.bench import tune
from hotlap.kernels import relu2 as module
from hotlap.kernels.dispatch import device_facts
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.relu2 import relu2, relu2_ref
from hotlap.kernels.rms_norm import rms_norm
from hotlap.kernels.tiles import fitting_tiles, tuned_tiles
from hotlap.model.gpt import GPT

pytestmark = pytest.mark.gpu


def test_inductor_sees_the_kernels_and_no_graph_break():
    def function(x):
        return rms_norm(relu2(x.sin()))

    x = random(64, 96, grad=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        y, code = run_and_get_code(torch.compile(function, fullgraph=True), x)
    for kernel in ("_relu2_forward_kernel", "_rms_norm_forward_kernel"):
        assert any(kernel in text for text in code)
    torch.testing.assert_close(y, function(x))


def test_a_model_compiles_whole_to_the_same_loss_and_gradients():
    model = GPT(tiny_config()).to(DEVICE).init_weights()
    ids = torch.arange(2 * 65, device=DEVICE).mul(31).remainder(320).view(2, 65)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        loss = run(ids[:, :-1], ids[:, 1:].contiguous(), reduction="mean")
        loss.backward()
        results.append((loss.detach(), model.head.weight.grad))
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def test_a_captured_operation_reads_its_inputs_at_each_replay():
    x = random(5000, grad=False)
    relu2(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = relu2(x)
    x.copy_(random(5000, seed=1, grad=False))
    graph.replay()
    torch.testing.assert_close(y, relu2_ref(x))


def test_the_loss_never_holds_all_logits():
    N, V, D = 16384, 32768, 256
    x, head = random(N, D, dtype=torch.bfloat16), random(V, D)
    targets = torch.arange(N, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, head, targets, softcap=15.0).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * N * V / 2


def test_facts_of_the_device_are_sane():
    facts = device_facts(DEVICE)
    assert facts.name == torch.cuda.get_device_name()
    assert 48 << 10 <= facts.shared_memory <= 1 << 20
    assert facts.processors >= 1 and facts.warp in (32, 64)


def test_tuning_measures_every_tile_that_fits_and_chooses_none_by_itself():
    case, facts = module.cases(torch.bfloat16)[0], device_facts(DEVICE)
    chosen = dict(tuned_tiles(facts.name))
    times = tune.measure(case, 1, DEVICE)
    assert len(times) == len(fitting_tiles(case.table, case.size, facts)) and min(times.values()) > 0
    assert tuned_tiles(facts.name) == chosen

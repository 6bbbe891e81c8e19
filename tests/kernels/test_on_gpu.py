"""What the interpreter cannot show: compilers, graphs and memory of a real GPU.

Where there is one, the other tests of this folder run natively too.
"""

from functools import partial

import pytest
import torch
from helpers.kernel_tools import DEVICE, error, outputs_and_gradients, random
from helpers.tools import tiny_config
from torch._inductor.utils import run_and_get_code

from hotlap.bench import tune
from hotlap.kernels import decode_linear
from hotlap.kernels import linear_cross_entropy as linear_cross_entropy_module
from hotlap.kernels import linear_relu2 as linear_relu2_module
from hotlap.kernels import orthogonalize as orthogonalize_module
from hotlap.kernels import relu2 as module
from hotlap.kernels.decode_attention import decode_attention
from hotlap.kernels.decode_linear import linear_residual, norm_linear
from hotlap.kernels.dispatch import device_facts
from hotlap.kernels.fp8 import linear_relu2_fp8
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from hotlap.kernels.linear_relu2 import linear_relu2, linear_relu2_ref
from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum, muon_squares
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.kernels.relu2 import relu2, relu2_ref
from hotlap.kernels.rms_norm import rms_norm
from hotlap.kernels.tiles import fitting_tiles, tuned
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


def test_one_graph_decodes_at_every_length():
    q, k, v = (random(2, 1, heads, 64, dtype=torch.bfloat16, grad=False) for heads in (4, 2, 2))
    caches = random(2, 2, 100, 2, 64, dtype=torch.bfloat16, grad=False)
    slots, lengths = torch.arange(2, device=DEVICE), torch.tensor([3, 50], device=DEVICE)
    decode_attention(q, k, v, *caches, slots, lengths, 40)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(q, k, v, *caches, slots, lengths, 40)
    for held in ([3, 50], [99, 0], [64, 65]):
        lengths.copy_(torch.tensor(held))
        graph.replay()
        assert torch.equal(y, decode_attention(q, k, v, *caches, slots, lengths, 40))


@pytest.mark.parametrize("rows", [1, 16])
def test_products_that_start_early_wait_for_what_they_read(rows, monkeypatch):
    """A chain of them, with attention between, in a graph, is what the plain form makes of it."""
    if device_facts(DEVICE).compute < 90:
        pytest.skip("needs compute capability 9.0")
    up = [random(6144, 1536, dtype=torch.bfloat16, grad=False, seed=i) / 40 for i in range(8)]
    down = [random(1536, 6144, dtype=torch.bfloat16, grad=False, seed=i) / 80 for i in range(8)]
    first = random(rows, 1536, dtype=torch.bfloat16, grad=False)
    scale = torch.ones(1, device=DEVICE, dtype=torch.bfloat16)
    caches = random(2, rows, 256, 12, 128, dtype=torch.bfloat16, grad=False)
    slots, lengths = torch.arange(rows, device=DEVICE), torch.full((rows,), 200, device=DEVICE)

    def chain():
        x = first
        for i, (wide, narrow) in enumerate(zip(up, down, strict=True)):
            hidden, total, _ = norm_linear(x, wide, (scale, scale, first), squared_relu=True)
            x = linear_residual(hidden, narrow, total)
            if i % 3 == 2:
                heads = x.view(rows, 1, 12, 128)
                x = decode_attention(heads, heads, heads, *caches, slots, lengths).view(rows, 1536)
        return x

    def pick(table, size, device, early=False):
        tiles = [tile for tile in fitting_tiles(table, size, device) if bool(tile.kernel) == early]
        return tiles[0]

    monkeypatch.setattr(decode_linear, "pick_tile", pick)
    plain = chain()
    monkeypatch.setattr(decode_linear, "pick_tile", partial(pick, early=True))
    assert torch.equal(chain(), plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, plain)


def test_the_loss_never_holds_all_logits():
    N, V, D = 16384, 32768, 256
    x, head = random(N, D, dtype=torch.bfloat16), random(V, D)
    targets = torch.arange(N, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, head, targets, softcap=15.0).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * N * V / 2


def test_64k_tokens_of_d24_take_less_than_3_gb():
    x, head = random(65536, 1536, dtype=torch.bfloat16), random(32768, 1536)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, head, torch.arange(65536, device=DEVICE) % 32768, softcap=15.0).backward()
    assert torch.cuda.max_memory_allocated() - before < 3e9


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_shares_of_dw_are_added_in_float32(head_dtype, monkeypatch):
    """On a GPU, by the product itself."""
    monkeypatch.setattr(linear_cross_entropy_module, "chunk_rows", lambda *_: 128)
    x = random(4096, 64, dtype=torch.bfloat16)
    # so small that rounding the logits to bfloat16 is less than rounding the shares would be
    head = (0.05 * random(512, 64)).detach().to(head_dtype).requires_grad_()
    targets = torch.arange(4096, device=DEVICE) % 512
    exact = [t.detach().double().requires_grad_() for t in (x, head.to(torch.bfloat16))]
    (dw,) = torch.autograd.grad(linear_cross_entropy(x, head, targets), head)
    (expected,) = torch.autograd.grad(linear_cross_entropy_ref(*exact, targets), exact[1])
    assert dw.dtype == head_dtype and error(dw, expected) < 5e-3


def test_a_layer_in_fp8_runs_forward_and_backward():
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    x, w_in, w_out = random(256, 512, dtype=torch.bfloat16), random(1024, 512), random(512, 1024)
    inputs = [x, *((w / w.shape[1] ** 0.5).detach().requires_grad_() for w in (w_in, w_out))]
    compiled = torch.compile(linear_relu2_fp8, fullgraph=True)
    dy = [random(256, 512, grad=False)]
    ours, again, exact = (
        outputs_and_gradients(f, inputs, dy) for f in (linear_relu2_fp8, compiled, linear_relu2_ref)
    )
    for a, b, c in zip(ours, again, exact, strict=True):
        assert error(a, c.double()) < 0.15 and error(b, a.double()) < 0.03


@pytest.mark.parametrize("shape", [(1000, 768, 3072), (333, 264, 1000), (16, 64, 128)])
def test_descriptors_give_the_product_that_pointers_give(shape, monkeypatch):
    """Each tile of the table, forward and backward, eager, compiled and captured in a graph."""
    facts = device_facts(DEVICE)
    if not facts.tma:
        pytest.skip("needs a TMA")
    M, D, N = shape
    x, w_in, w_out = random(M, D, dtype=torch.bfloat16), random(N, D), random(D, N)
    inputs = [x, *((w / w.shape[1] ** 0.5).detach().to(x.dtype).requires_grad_() for w in (w_in, w_out))]
    dy = [random(M, D, seed=1, grad=False)]

    def results(place: int, function):
        def pick(table, size, device):
            tiles = [t for t in fitting_tiles(table, size, device) if bool(t.kernel) == (place >= 0)]
            return tiles[min(max(place, 0), len(tiles) - 1)]

        monkeypatch.setattr(linear_relu2_module, "pick_tile", pick)
        torch._dynamo.reset()
        return outputs_and_gradients(function, inputs, dy)

    plain = results(-1, linear_relu2)
    runs = [results(place, linear_relu2) for place in range(4)]
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, code = run_and_get_code(results, 0, torch.compile(linear_relu2, fullgraph=True))
    assert sum("_linear_relu2_tma_kernel" in text for text in code) == 2  # forward and backward
    for run in (*runs, compiled):
        for a, b in zip(run, plain, strict=True):
            assert error(a, b.double()) < 5e-3
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = linear_relu2(*inputs)
    graph.replay()
    assert error(y, plain[0].double()) < 5e-3
    x.detach().zero_()
    graph.replay()
    assert not y.any()


@pytest.mark.parametrize("n, K", [(1000, 1536), (136, 72), (64, 4096)])
@pytest.mark.parametrize("tall", [False, True])
def test_descriptors_give_the_symmetric_product_that_pointers_give(n, K, tall, monkeypatch):
    """Each tile of the table, which has fewer programs than blocks."""
    facts = device_facts(DEVICE)
    if not facts.tma:
        pytest.skip("needs a TMA")
    x = random(20, *((K, n) if tall else (n, K)), dtype=torch.float16, grad=False) / K**0.5
    added = random(20, n, n, dtype=torch.float16, grad=False)
    added = added + added.mT
    exact = x.double().mT @ x.double() if tall else x.double() @ x.double().mT
    exact = 0.5 * exact - 2 * added.double() + 3 * torch.eye(n, device=DEVICE)
    for tile in fitting_tiles(orthogonalize_module._symmetric_tiles, 0, facts):
        monkeypatch.setattr(orthogonalize_module, "pick_tile", lambda *_, tile=tile: tile)
        y = orthogonalize_module._symmetric_product(x, x, tall, 0.5, added, -2.0, 3.0)
        assert torch.equal(y, y.mT) and error(y, exact) < 1e-3, tile


def test_a_captured_muon_step_reads_its_rates_at_each_replay():
    grad, momentum, weight = (random(2, 64, 160, grad=False, seed=i) for i in range(3))
    second, beta, lr = (
        torch.zeros(2, 1, 160, device=DEVICE),
        *torch.tensor([0.9, 0.1], device=DEVICE).unbind(),
    )

    def step():
        update = orthogonalize(muon_momentum(grad.unbind(), momentum, beta, torch.bfloat16), norm=8.0)
        muon_apply(weight.unbind(), update, muon_factors(muon_squares(update), second, 64, 0.9), lr, lr)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    lr.zero_()
    before = weight.clone()
    graph.replay()
    assert torch.equal(weight, before)
    lr.fill_(0.1)
    graph.replay()
    assert not torch.equal(weight, before)


def test_facts_of_the_device_are_sane():
    facts = device_facts(DEVICE)
    assert facts.name == torch.cuda.get_device_name()
    assert 48 << 10 <= facts.shared_memory <= 1 << 20
    assert facts.processors >= 1 and facts.warp in (32, 64)


def test_tuning_measures_every_tile_that_fits_and_chooses_none_by_itself():
    case, facts = module.cases(torch.bfloat16)[0], device_facts(DEVICE)
    chosen = dict(tuned(facts).tiles)
    times = tune.measure_tiles(case, 0.01, DEVICE)
    assert len(times) == len(fitting_tiles(case.table, case.size, facts)) and min(times.values()) > 0
    assert tuned(facts).tiles == chosen

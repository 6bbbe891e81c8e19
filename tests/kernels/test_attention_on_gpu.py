"""Attention on a real GPU: compiled, by torch's kernels, and by those for Hopper."""

import pytest
import torch
from helpers.kernel_tools import DEVICE, document_starts, error, outputs_and_gradients, random
from torch._inductor.utils import run_and_get_code

from hotlap.kernels import attention_backward, attention_forward, attention_hopper
from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.attention_torch import sdpa_takes
from hotlap.kernels.dispatch import device_facts
from hotlap.kernels.tiles import fitting_tiles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 64])
def test_auto_and_ours_agree_whole_and_compiled(window):
    inputs = [random(2, 256, 4, 128, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    ours = attention(*inputs, window, backend="triton")
    for function in (attention, torch.compile(attention, fullgraph=True)):
        torch.testing.assert_close(function(*inputs, window), ours, rtol=2e-2, atol=2e-2)


@pytest.fixture
def hopper(monkeypatch):
    """A function that lets attention run with the tiles of such a place among those for Hopper."""
    if device_facts(DEVICE).compute != 90 or attention_hopper.MISSING:
        pytest.skip("needs a Hopper GPU and Triton's Gluon")

    def use(place: int) -> None:
        def pick(table, size, device):
            tiles = fitting_tiles(table, size, device)
            forms = [tile for tile in tiles if tile.kernel]
            return forms[min(place, len(forms) - 1)] if forms else tiles[0]

        monkeypatch.setattr(attention_forward, "pick_tile", pick)
        torch._dynamo.reset()

    yield use
    torch._dynamo.reset()


@pytest.fixture
def described(monkeypatch):
    """The shapes that were described to the TMA: that the kernels for Hopper ran."""
    shapes = []

    def describe(x, rows):
        shapes.append(x.shape)
        return attention_hopper.describe(x, rows)

    for file in (attention_forward, attention_backward):
        monkeypatch.setattr(file, "describe", describe)
    return shapes


def attention_case(T, S, H, K, window=None, lengths=(), dtype=torch.bfloat16):
    """q, k and v as views of one projection, with window and document_start; and the gradient of y."""
    qkv = random(2, S, H + 2 * K, 128, dtype=dtype, grad=False)
    q, k, v = (x.requires_grad_() for x in qkv.split((H, K, K), dim=2))
    document_start = None
    if lengths:
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        document_start = document_starts(ends, S)[:, S - T :].expand(2, T)
    return [q[:, S - T :], k, v, window, document_start], [
        random(2, T, H, 128, seed=1, grad=False, dtype=dtype)
    ]


HOPPER_CASES = {
    "plain": (512, 512, 2, 2),
    "long": (2000, 2000, 16, 16),
    "window": (700, 700, 2, 2, 200),
    "narrow window": (700, 700, 2, 2, 1),
    "documents": (1000, 1000, 2, 2, None, (1, 255, 257, 87, 400)),
    "both": (1000, 1000, 2, 2, 300, (600, 1, 399)),
    "grouped heads": (500, 500, 6, 2, 100),
    "fewer queries": (200, 300, 2, 1),
    "fewer queries, both": (200, 300, 2, 1, 130, (90, 130, 80)),
    "a row": (1, 1, 2, 2),
    "a row of queries": (1, 257, 2, 2),
    "more queries than keys": (300, 40, 2, 2),
}


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_attention_for_hopper_is_attention(name, place, dtype, hopper, described):
    hopper(place)
    T, S, H, K, *masks = HOPPER_CASES[name]
    if T > S:
        inputs, gradients = attention_case(T, T, H, K, dtype=dtype)
        inputs[1:3] = (x[:, :S] for x in inputs[1:3])
    else:
        inputs, gradients = attention_case(T, S, H, K, *masks, dtype=dtype)
    inputs[:3] = (x.detach().requires_grad_() for x in inputs[:3])  # leaves, which are still views
    runs = [
        outputs_and_gradients(lambda *x: attention(*x, backend="triton"), inputs, gradients) for _ in range(2)
    ]
    assert len(described) == 2 * (4 + 6 + 6)
    assert all(map(torch.equal, *runs))
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    expected = outputs_and_gradients(attention_ref, [*exact, *inputs[3:]], [gradients[0].double()])
    scale = 1e-3 * gradients[0].double().norm().item()  # where queries have one key, exact dq and dk are zero
    for a, b in zip(runs[0], expected, strict=True):
        assert error(a, b, scale) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("documents", [False, True])
def test_attention_for_hopper_compiles_to_the_same_results(documents, hopper, described):
    hopper(0)
    inputs, gradients = attention_case(300, 300, 4, 2, 100, (120, 180) if documents else ())
    qkv = random(2, 300, 8 * 128, dtype=torch.bfloat16)

    def function(qkv, document_start):
        q, k, v = qkv.view(2, 300, 8, 128).split((4, 2, 2), dim=2)
        return attention(q, k, v, 100, document_start, backend="triton")

    eager = outputs_and_gradients(function, [qkv, inputs[4]], gradients)
    compiled = torch.compile(function, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        again, code = run_and_get_code(outputs_and_gradients, compiled, [qkv, inputs[4]], gradients)
    assert any("attention_special" in text for text in code)
    assert len(described) == 2 * (4 + 6 + 6)
    assert all(map(torch.equal, eager, again))


def test_attention_for_hopper_reads_its_inputs_at_each_replay(hopper):
    hopper(0)
    inputs, _ = attention_case(300, 300, 4, 2)
    with torch.no_grad():
        inputs = [x.clone() for x in inputs[:3]]
        attention(*inputs, backend="triton")  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attention(*inputs, backend="triton")
        inputs[2].mul_(2)
        graph.replay()
        assert torch.equal(y, attention(*inputs, backend="triton"))


def test_what_the_tma_does_not_take_is_for_the_plain_kernels(hopper, described):
    hopper(0)
    (q, k, v, *_), _ = attention_case(100, 100, 2, 2)
    wide = random(2, 100, 2, 132, dtype=torch.bfloat16, grad=False)[..., :128]  # rows of 264 bytes
    for inputs, softcap in (((q, wide, v), None), ((q, k, v), 15.0)):
        y = attention(*inputs, softcap=softcap, backend="triton")
        exact = attention_ref(*(x.detach().double() for x in inputs), softcap=softcap)
        assert error(y.detach(), exact) < 1e-2
    assert not described


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_torch_takes_what_it_is_said_to_take(backend):
    inputs = [random(1, 128, heads, 64, dtype=torch.bfloat16, seed=i) for i, heads in enumerate((4, 2, 2))]
    if not sdpa_takes(backend, DEVICE, torch.bfloat16, 64, 128, True):
        pytest.skip(f"torch has no {backend} attention here")
    exact = attention_ref(*inputs).detach().double()
    y = attention(*inputs, backend=backend)
    y.sum().backward()
    assert error(y.detach(), exact) < 1e-2

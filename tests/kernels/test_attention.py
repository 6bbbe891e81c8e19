"""Attention against a naive float64 softmax."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.tools import assert_as_good, relative_error
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from hotlap.kernels import attention_blockwise as module
from hotlap.kernels.attention import attention, attention_ref, visible_keys


@pytest.fixture(params=["c", "torch"], autouse=True)
def kernels(request, choose_kernels):
    """The softmax in C, on poisoned memory, and torch's."""
    return choose_kernels("torch") if request.param == "torch" else request.getfixturevalue("c_kernels")


def naive(q, k, v, window=None, document_start=None):
    """Query by query, in float64: only the visible keys are ever touched."""
    q, k, v = q.double(), k.double(), v.double()
    B, T, H, C = q.shape
    groups = H // k.shape[2]
    rows = []
    for b in range(B):
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            if document_start is not None:
                first = max(first, int(document_start[b, t]))
            keys = k[b, first : t + 1].repeat_interleave(groups, 1)  # (S, H, C)
            values = v[b, first : t + 1].repeat_interleave(groups, 1)
            weights = (torch.einsum("hc,shc->hs", q[b, t], keys) * C**-0.5).softmax(-1)
            rows.append(torch.einsum("hs,shc->hc", weights, values))
    return torch.stack(rows).view(B, T, H, C)


def plain(q, k, v, window=None, document_start=None):
    """PyTorch's attention with a mask, in the dtype of q."""
    mask = visible_keys(q.shape[1], k.shape[1], window, document_start, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def fused_qkv(B, T, H, K, C, dtype):
    """q, k, v as the model has them: views of one product's output."""
    qkv = torch.randn(B, T, H + 2 * K, C, generator=torch.Generator().manual_seed(T + C)).to(dtype)
    return [x.detach().requires_grad_() for x in qkv.split((H, K, K), dim=2)]


def gradients(function, inputs, upstream, *arguments):
    """The output, and the gradients of the inputs."""
    y = function(*inputs, *arguments)
    return y.detach(), torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def starts(lengths: list[int]) -> list[int]:
    """Where each token's document starts, for a row of documents of these lengths."""
    return [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]


def check(B, T, H, K, C, dtype, window=None, document_start=None):
    inputs = fused_qkv(B, T, H, K, C, dtype)
    upstream = torch.randn(B, T, H, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact, exact_grads = gradients(naive, doubles, upstream, window, document_start)
    usual, usual_grads = gradients(plain, inputs, upstream, window, document_start)
    blockwise = functools.partial(attention, backend="blockwise")
    for function in (attention, blockwise, attention_ref):
        y, grads = gradients(function, inputs, upstream, window, document_start)
        assert_as_good(y.to(dtype), usual, exact)
        for actual, other, wanted in zip(grads, usual_grads, exact_grads, strict=True):
            assert_as_good(actual, other, wanted)
    assert attention(*inputs, window, document_start).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 5, 64, None])
@pytest.mark.parametrize("T", [1, 17, 63, 128, 200, 257])
def test_attention_is_the_naive_one_at_any_length_and_window(T, window, dtype):
    check(1, T, 2, 2, 32, dtype, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [32, 64, 80])
@pytest.mark.parametrize("H, K", [(4, 1), (4, 2), (3, 3)])
def test_head_sizes_and_grouped_heads(C, H, K, dtype):
    check(2, 70, H, K, C, dtype, window=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [5, None])
def test_documents_of_one_row_do_not_see_each_other(window, dtype):
    document_start = torch.tensor([starts([1, 1, 60, 1, 67]), starts([100, 29, 1])])
    check(2, 130, 2, 1, 32, dtype, window, document_start)


def test_a_window_longer_than_the_sequence_is_no_window():
    q, k, v = fused_qkv(1, 100, 2, 2, 32, torch.float32)
    assert torch.equal(attention(q, k, v, 100), attention(q, k, v))
    assert torch.equal(attention(q, k, v, 1000), attention(q, k, v))


@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_window_of_w_sees_w_keys(window):
    """The gradient of one query's output reaches exactly its own key and the w - 1 before it."""
    q, k, v = fused_qkv(1, 150, 1, 1, 32, torch.float32)
    (grad,) = torch.autograd.grad(attention(q, k, v, window)[0, 120].sum(), v)
    assert grad[0, :, 0, 0].nonzero().flatten().tolist() == list(range(121 - window, 121))


@pytest.mark.parametrize("hidden_by", ["window", "documents"])
def test_what_is_computed_in_blocks_grows_with_the_tokens_and_not_with_their_square(hidden_by):
    counts = []
    for T in (2048, 4096):
        window, document_start = (
            (256, None) if hidden_by == "window" else (0, torch.arange(T)[None] // 256 * 256)
        )
        q, k, v = (x.detach() for x in fused_qkv(1, T, 2, 1, 8, torch.float32))
        with FlopCounterMode(display=False) as counter:
            module._forward(q, k, v, document_start, window, 0.0, 1.0)
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] < 2.1 * counts[0]
    assert counts[0] < 2048 * 400 * (4 * 2 * 8)  # queries, keys, and what each pair takes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "T, S, window", [(90, 90, 70), (30, 90, None), (90, 40, 1), (1, 300, 70), (193, 193, None)]
)
def test_gradients_of_blocks_are_those_of_the_specification(T, S, window, softcap, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = [random(2, n, heads, 16).requires_grad_() for n, heads in ((T, 4), (S, 2), (S, 2))]
    document_start = torch.tensor([[7], [50]]).expand(2, T) if T <= S else None  # where some see no key
    upstream, arguments = random(2, T, 4, 16), (window, document_start, softcap, 0.7)
    y, grads = gradients(lambda *x: attention(*x, backend="blockwise"), inputs, upstream, *arguments)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    wanted, wanted_grads = gradients(attention_ref, doubles, upstream, *arguments)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    for ours, exact in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert ours.dtype == dtype and relative_error(ours, exact) < tolerance


@pytest.mark.parametrize("layout", ["heads first", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_of_blocks_do_not_matter(layout):
    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack((x, x), -1)[..., 0] if layout == "channels apart" else x[:1].expand(x.shape)

    inputs, upstream = fused_qkv(2, 150, 4, 2, 16, torch.float32), torch.randn(2, 150, 4, 16)
    views = [view(x.detach()).requires_grad_() for x in inputs]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    ours, wanted = (
        gradients(lambda *x: attention(*x, backend="blockwise"), given, gradient, 40)
        for given, gradient in ((views, view(upstream)), (copies, view(upstream).contiguous()))
    )
    for a, b in zip((ours[0], *ours[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_compile_whole_with_their_documents_and_without_looking_into_them():
    inputs, operations = fused_qkv(2, 130, 4, 2, 16, torch.float32), []

    def backend(graph, _):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    document_start = torch.tensor([starts([1, 100, 29]), starts([70, 60])])
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    upstream = torch.randn(2, 130, 4, 16)
    y, grads = gradients(compiled, inputs, upstream, 50, document_start)
    wanted, wanted_grads = gradients(attention, inputs, upstream, 50, document_start)
    assert any("attention_blockwise" in name for name in operations) and len(operations) < 20
    for a, b in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operations_on_blocks_keep_the_rules_of_torch():
    inputs = fused_qkv(2, 70, 2, 1, 16, torch.float32)
    document_start = torch.tensor([starts([30, 40]), starts([70])])
    arguments = (document_start, 9, 2.0, 0.25)
    opcheck(module.attention_blockwise.registered(), (*inputs, *arguments))
    detached = (x.detach() for x in inputs)
    opcheck(
        module._attention_blockwise_backward.registered(), (torch.randn(2, 70, 2, 16), *detached, *arguments)
    )

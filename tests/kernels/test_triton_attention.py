import pytest
import torch
from helpers.kernel_tools import (
    DEVICE,
    DTYPES,
    check,
    document_starts,
    far_apart,
    outputs_and_gradients,
    random,
)
from torch.library import opcheck

from hotlap.kernels import attention as module
from hotlap.kernels import attention_backward, attention_forward
from hotlap.kernels.attention import attention, visible_keys
from hotlap.kernels.attention_forward import query_block
from hotlap.kernels.dispatch import jit, tl
from hotlap.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 32 queries and 16 keys, or the other way round, so that short rows have many of them."""

    def table(m, n):
        return lambda block_c, _: [Tile({"BLOCK_C": block_c, "BLOCK_M": m, "BLOCK_N": n})]

    monkeypatch.setattr(attention_forward, "_attention_forward_tiles", table(32, 16))
    monkeypatch.setattr(attention_backward, "_attention_dq_tiles", table(16, 32))
    monkeypatch.setattr(attention_backward, "_attention_dk_dv_tiles", table(16, 32))


def triton(q, k, v, window=None, document_start=None, softcap=None, scale=None):
    return attention(q, k, v, window, document_start, softcap, scale, backend="triton")


def case(B, T, H, K, C, dtype=torch.float32, S=None):
    """q, k and v as views of one projection, of which q is the last T positions, and the gradient of y."""
    S = S or T
    qkv = random(B, S, H + 2 * K, C, dtype=dtype, grad=False)
    q, k, v = qkv.split((H, K, K), dim=2)
    return [x.requires_grad_() for x in (q[:, S - T :], k, v)], [random(B, T, H, C, seed=1, grad=False)]


def starts(*rows: list[int]) -> torch.Tensor:
    """document_start of rows of documents of these lengths."""
    found = [document_starts(torch.tensor([0, *lengths]).cumsum(0), sum(lengths)) for lengths in rows]
    return torch.cat(found).to(DEVICE)


def rounded(q, k, v, window=None, document_start=None, softcap=None, scale=None):
    """Plain products, which round the weights to the dtype as the kernels do."""
    return attention(q, k, v, window, document_start, softcap, scale, backend="blockwise")


def compare(inputs, gradients, *arguments):
    check(triton, rounded, [*inputs, *arguments], gradients, scales(*inputs, gradients[0], *arguments))


def scales(q, k, v, dy, window=None, document_start=None, softcap=None, scale=None) -> list[float]:
    """The norms that errors of y, dq, dk and dv are measured against if the exact ones are smaller: none.

    But where no query has a choice of keys, dq and dk are zero, the differences p (dy v^T - delta) of equal
    numbers: there, the norms of what the products dy v^T, without their signs, would contribute.
    """
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = visible_keys(T, S, window, document_start, q.device)
    if (seen.sum(-1) > 1).any():
        return [1e-30] * 4
    q, k, v, dy = (x.detach().double().abs().transpose(1, 2) for x in (q, k, v, dy))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    ds = seen * (dy @ v.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    return [1e-30, (ds @ k).norm().item(), (ds.mT @ q).norm().item(), 1e-30]


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("T", [1, 17, 63, 128])
def test_any_length_and_window(T, window):
    compare(*case(1, T, 1, 1, 32), window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, window", [(200, 64), (257, None), (257, 1000)])
def test_long_rows_in_every_dtype(T, window, dtype):
    compare(*case(1, T, 1, 1, 16, dtype), window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [32, 64, 80, 96, 128, 256])
def test_every_head_size(C, dtype):
    compare(*case(1, 33, 1, 1, C, dtype))


@pytest.mark.parametrize("H, K", [(4, 1), (6, 2), (3, 3)])
def test_grouped_heads(H, K):
    compare(*case(2, 50, H, K, 16), 20)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[100], [1, 99], [40, 1, 59], [1, 1, 97, 1], [31, 33, 35, 1]])
def test_documents_of_one_row_do_not_see_each_other(lengths, window):
    inputs, gradients = case(1, 100, 2, 1, 16)
    compare(inputs, gradients, window, starts(lengths))
    alone = torch.cat([triton(*(x[:, a : a + n] for x in inputs), window) for a, n in spans(lengths)], 1)
    torch.testing.assert_close(triton(*inputs, window, starts(lengths)), alone, rtol=1e-5, atol=1e-6)


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    return [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def test_rows_of_different_documents():
    compare(*case(2, 90, 2, 1, 16), 30, starts([30, 60], [1, 80, 9]))


@pytest.mark.parametrize("T, S", [(1, 50), (17, 80), (40, 41), (50, 20)])
@pytest.mark.parametrize("window", [None, 10])
def test_queries_are_the_last_of_the_positions(T, S, window):
    (q, _, _), gradients = case(2, T, 2, 1, 16)
    k, v = (random(2, S, 1, 16, seed=seed) for seed in (2, 3))
    compare([q, k, v], gradients, window)
    document_start = torch.full((2, T), 7, device=DEVICE)
    compare([q, k, v], gradients, window, document_start)


def test_a_chunk_of_queries_is_that_part_of_all():
    (q, k, v), _ = case(1, 80, 2, 1, 16)
    whole = triton(q, k, v, 25)
    torch.testing.assert_close(triton(q[:, 50:70], k[:, :70], v[:, :70], 25), whole[:, 50:70])


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_scale(dtype):
    (q, k, v), gradients = case(1, 60, 2, 1, 16, dtype)
    compare([q, k, v], gradients, None, None, 2.0)
    compare([q, k, v], gradients, 17, starts([20, 40]), 1.5, 0.7)


def test_large_scores_neither_overflow_nor_vanish():
    (q, k, v), (dy,) = case(1, 40, 1, 1, 16)
    inputs = [(100 * q).detach().requires_grad_(), (100 * k).detach().requires_grad_(), v]
    y, *gradients = outputs_and_gradients(triton, inputs, [dy])
    torch.testing.assert_close(y, rounded(*inputs), rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in gradients) and gradients[2].any()


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    (q, k, v), (dy,) = case(1, 40, 1, 1, 16)
    document_start = torch.full((1, 40), 40, device=DEVICE)
    document_start[:, :10] = 5  # the queries at 0 to 4, and those from 10 on, see nothing
    y, *gradients = outputs_and_gradients(triton, (q, k, v, None, document_start), [dy])
    blind = [*range(5), *range(10, 40)]
    assert not y[:, blind].any() and not gradients[0][:, blind].any()
    assert y[:, 5:10].all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("layout", ["heads first", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack((x, x), -1)[..., 0] if layout == "channels apart" else x[:1, :, :1].expand(x.shape)

    inputs, gradients = case(2, 35, 4, 2, 16)
    compare([view(x).detach().requires_grad_() for x in inputs], [view(g) for g in gradients], 20)
    triton(*inputs).sum().backward()  # a gradient of stride 0


@pytest.mark.xdist_group("gigabytes")
def test_rows_may_lie_beyond_two_to_the_31():
    inputs, gradients = case(3, 18, 1, 1, 16, torch.float16)
    inputs, gradients = [x.detach().requires_grad_() for x in inputs], [gradients[0].half()]
    far = [far_apart(x).requires_grad_() for x in inputs], [far_apart(gradients[0])]
    ours = outputs_and_gradients(triton, *far)
    for a, b in zip(ours, outputs_and_gradients(triton, inputs, gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.xdist_group("gigabytes")
def test_tokens_may_lie_far_apart():
    """Offsets of tokens within a row of 2^31 elements and more are 64 bits wide."""
    inputs, gradients = case(1, 300, 1, 1, 16, torch.float16)
    apart = (1 << 23) - 16

    def far(x):
        wide = torch.empty_strided(x.shape, (300 * apart, apart, 16, 1), device=DEVICE, dtype=x.dtype)
        return wide.copy_(x.detach()).requires_grad_()

    near = [x.detach().requires_grad_() for x in inputs]
    ours = outputs_and_gradients(triton, [*map(far, near), 16], [far(gradients[0].half()).detach()])
    for a, b in zip(ours, outputs_and_gradients(triton, [*near, 16], gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 16), (2, 0, 2, 1, 16)])
def test_nothing_gives_nothing(shape):
    compare(*case(*shape))


@pytest.mark.parametrize(
    "hidden, window, documents, clean",
    [
        (slice(0, 64), 17, False, slice(96, None)),  # before the window
        (slice(0, 64), None, True, slice(64, None)),  # another document
        (slice(64, None), None, False, slice(0, 64)),  # the future
    ],
)
def test_keys_that_no_query_of_a_block_sees_are_never_loaded(hidden, window, documents, clean):
    """NaN there would reach y and dq through its products with zeros."""
    (q, k, v), (dy,) = case(1, 128, 1, 1, 16)
    with torch.no_grad():
        k[:, hidden], v[:, hidden] = float("nan"), float("nan")
    document_start = starts([64, 64]) if documents else None
    y, dq, _, _ = outputs_and_gradients(triton, (q, k, v, window, document_start), [dy])
    assert y[:, clean].isfinite().all() and dq[:, clean].isfinite().all()
    assert not y[:, hidden].isfinite().any()


@pytest.mark.parametrize(
    "hidden, window, documents, clean",
    [
        (slice(96, None), 17, False, slice(0, 64)),  # beyond the window
        (slice(64, None), None, True, slice(0, 64)),  # another document
        (slice(0, 64), None, False, slice(64, None)),  # the past
    ],
)
def test_queries_that_see_no_key_of_a_block_are_never_loaded(hidden, window, documents, clean):
    """NaN there would reach dk and dv through its products with zeros."""
    (q, k, v), (dy,) = case(1, 128, 1, 1, 16)
    with torch.no_grad():
        q[:, hidden] = float("nan")
    document_start = starts([64, 64]) if documents else None
    _, _, dk, dv = outputs_and_gradients(triton, (q, k, v, window, document_start), [dy])
    assert dk[:, clean].isfinite().all() and dv[:, clean].isfinite().all()
    assert not dk[:, hidden].isfinite().any()


@jit
def _order_kernel(heads, first_rows, section, B, T, H, BLOCK_M: tl.constexpr):
    program = tl.program_id(0)
    b, h, start, _ = query_block(program, section, B, T, H, BLOCK_M)
    tl.store(heads + program, b * H + h)
    tl.store(first_rows + program, start)


def test_queries_that_see_the_most_keys_start_first_in_each_section_of_heads():
    heads, rows = (torch.full((24,), -1, device=DEVICE, dtype=torch.int32) for _ in range(2))
    _order_kernel[(24,)](heads, rows, 4, 2, 50, 3, BLOCK_M=16)
    order = list(zip(heads.tolist(), rows.tolist(), strict=True))
    assert sorted(order) == [(head, row) for head in range(6) for row in (0, 16, 32, 48)]
    for section, those in ((order[:16], {0, 1, 2, 3}), (order[16:], {4, 5})):
        assert {head for head, _ in section} == those
        assert [row for _, row in section] == sorted((row for _, row in section), reverse=True)


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(2, 70, 4, 2, 16, torch.bfloat16)
    first, second = (outputs_and_gradients(triton, [*inputs, 30], gradients) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_heads_in_small_sections_are_all_there(monkeypatch):
    monkeypatch.setattr(attention_forward, "SHARED_CACHE", 3 * 2 * 50 * 16 * 4)  # three heads of 50 keys
    assert attention_forward.heads_in_section(50, 16, 8, 4) == 3
    compare(*case(2, 50, 4, 2, 16))


def test_the_operations_keep_the_rules_of_torch():
    (q, k, v), (dy,) = case(1, 20, 2, 1, 16)
    document_start = starts([5, 15]).int()
    for forward, backward, special in (
        (module._attention, module._attention_backward, False),
        (module._attention_special, module._attention_backward_special, True),
    ):
        opcheck(forward.registered(), (q, k, v, document_start, 7, 0.0, 0.25, special))
        opcheck(forward.registered(), (q, k, v, None, 0, 1.0, 0.25, special))
        y, lse = forward(q, k, v, document_start, 7, 0.0, 0.25, special)
        arguments = [x.detach() for x in (q, k, v)] + [document_start, y.detach(), lse]
        opcheck(backward.registered(), (dy, *arguments, 7, 0.0, 0.25, special))


def test_compiles_whole_to_the_same_results():
    def function(qkv, document_start):
        q, k, v = qkv.sin().split((4, 2, 2), dim=2)
        return attention(q, k, v, 9, document_start).flatten(2)

    inputs = random(2, 30, 8, 16), starts([30], [10, 20])
    gradients = [random(2, 30, 64, grad=False)]
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_named():
    (q, k, v), _ = case(1, 8, 3, 1, 16)
    for wrong, match in (
        (lambda: attention(q, k[:, :, :0], v), "q is"),
        (lambda: attention(q, k, v[:, :4]), "multiple of K"),
        (lambda: attention(q.half(), k, v), "of one dtype"),
        (lambda: attention(q, k, v, 0), "window=0"),
        (lambda: attention(q, k, v, document_start=starts([4])), "document_start is"),
        (lambda: attention(q, k, v, backend="magic"), "known: auto, triton"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()

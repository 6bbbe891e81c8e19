"""The batch-invariant mode: what its functions compute, and that nothing else changes a row's bits."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_tools import as_double, chosen, error
from torch.library import opcheck

from hotlap.kernels import batch_invariant as module
from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.attention_in_order import _attention_in_order, attention_in_order
from hotlap.kernels.batch_invariant import (
    batch_invariant,
    batch_invariant_works,
    log_softmax,
    product,
    sigmoid,
    softcap,
)
from hotlap.kernels.decode_attention import decode_attention
from hotlap.kernels.decode_linear import fusing_pays
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.linear_relu2 import linear_relu2
from hotlap.kernels.qkv import attention_inputs, rotary_tables
from hotlap.kernels.rms_norm import rms_norm, rms_norm_residual

pytestmark = pytest.mark.usefixtures("c_kernels")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (5, 7, 3), (47, 33, 40), (49, 64, 96), (200, 300, 70), (97, 128, 513)]  # R, D, N


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def learning(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def moved(x, by):
    """The same numbers, `by` elements from where torch would begin."""
    room = torch.empty(x.numel() + by, dtype=x.dtype)
    return room[by:].view(x.shape).copy_(x)


@both_dtypes
@pytest.mark.parametrize("R, D, N", SHAPES)
def test_products_and_their_gradients_are_as_exact_as_torchs(R, D, N, dtype):
    x, weight, dy = (
        random(R, D, dtype=dtype),
        random(N, D, dtype=dtype, seed=1),
        random(R, N, dtype=dtype, seed=2),
    )
    found = []
    for convert, on in ((torch.clone, True), (torch.clone, False), (as_double, False)):
        given = learning(convert(x), convert(weight))
        with batch_invariant(on):
            y = product(*given)
        found.append([y, *torch.autograd.grad(y, given, convert(dy))])
    for ours, torchs, exact in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert error(ours, exact) <= 2 * error(torchs, exact) + 2**-20


@both_dtypes
@pytest.mark.parametrize("R, D, N", SHAPES)
def test_a_row_of_a_product_has_the_same_bits_alone_in_any_layout_and_on_any_threads(R, D, N, dtype):
    x, weight = random(R, D, dtype=dtype), random(N, D, dtype=dtype, seed=1)
    with batch_invariant():
        whole = product(x, weight)
        for rows in (slice(0, 1), slice(R // 2, R), slice(R - 1, None), slice(1, R, 3)):
            assert torch.equal(product(x[rows], weight), whole[rows])
        assert torch.equal(product(x.T.contiguous().T, weight.T.contiguous().T), whole)
        assert torch.equal(product(moved(x, 3), moved(weight, 1)), whole)
        torch.set_num_threads(2)
        try:
            assert torch.equal(product(x, weight), whole)
        finally:
            torch.set_num_threads(1)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = random(5, 7).requires_grad_(), random(3, 7, seed=1)
    with batch_invariant():
        product(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 7))
    assert weight.grad is None


CASES = {  # B, T, H, K, C, window, softcap, documents
    "causal": (2, 70, 3, 3, 32, None, None, False),
    "one token": (3, 1, 2, 1, 80, None, None, False),
    "a window": (2, 75, 2, 2, 64, 17, None, False),
    "a window of one key": (1, 20, 2, 2, 64, 1, None, False),
    "grouped heads": (1, 50, 8, 2, 32, 30, None, False),
    "documents, softcap": (2, 61, 4, 2, 32, None, 5.0, True),
    "documents, window": (3, 61, 2, 2, 24, 20, None, True),
}


def heads(B, T, H, K, C, dtype):
    return [random(B, T, n, C, dtype=dtype, seed=i) for i, n in enumerate((H, K, K))]


def starts_of(B, T):
    """Documents that begin at other places in each row."""
    places = torch.arange(T)
    return torch.stack([(places - b) // (11 + b) * (11 + b) + b for b in range(B)]).clamp(min=0)


@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_as_exact_as_blockwise(case, dtype):
    B, T, H, K, C, window, cap, documents = CASES[case]
    given, starts = heads(B, T, H, K, C, dtype), starts_of(B, T) if documents else None
    dy = random(B, T, H, C, dtype=dtype, seed=9)
    found = []
    blockwise = functools.partial(attention, backend="blockwise")
    for convert, function in ((torch.clone, attention), (torch.clone, blockwise), (as_double, attention_ref)):
        learns = learning(*map(convert, given))
        with batch_invariant():
            y = function(*learns, window, starts, cap).to(convert(dy).dtype)
        found.append([y, *torch.autograd.grad(y, learns, convert(dy))])
    for ours, torchs, exact in zip(*found, strict=True):
        assert error(ours, exact) <= 2 * error(torchs, exact) + 2**-20


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v = heads(1, 5, 2, 2, 32, torch.float32)
    starts = torch.tensor([[0, 0, 3, 3, 3]])
    y = attention_in_order(q, k, v, document_start=starts)
    assert torch.equal(y[0, 2], torch.zeros(2, 32)) and y.isfinite().all()


@both_dtypes
@pytest.mark.parametrize("case", [name for name, values in CASES.items() if not values[7]])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_a_cache_gives_the_bits_of_a_whole_row(case, parts, dtype):
    """Sequences whose tokens come a few at a time, in rings that are as short as they can be."""
    B, T, H, K, C, window, cap, _ = CASES[case]
    q, k, v = heads(B, T, H, K, C, dtype)
    ring = min(T, window + parts - 1) if window else T
    caches = torch.full((2, B + 1, ring, K, C), float("nan"), dtype=dtype)
    slots = torch.arange(B, 0, -1)
    with batch_invariant():
        whole = attention(q, k, v, window, None, cap)
        for start in range(0, T, parts):
            new = slice(start, start + parts)
            held = torch.full((B,), start)
            y = decode_attention(q[:, new], k[:, new], v[:, new], *caches, slots, held, window, cap)
            assert torch.equal(y, whole[:, new])


@both_dtypes
@pytest.mark.parametrize("N", [1, 15, 64, 1001, 40000])
def test_elements_have_the_same_bits_wherever_they_lie(N, dtype):
    x = 3 * random(N, dtype=dtype)
    with batch_invariant():
        for function in (sigmoid, lambda x: softcap(x.float(), 15.0)):
            whole = function(x)
            for part in (slice(0, 1), slice(1, 18), slice(N // 2, N), slice(N - 1, N)):
                assert torch.equal(function(x[part]), whole[part])
                assert torch.equal(function(moved(x[part], 3)), whole[part])


@pytest.mark.parametrize("function", [sigmoid, lambda x: softcap(x, 15.0)], ids=["sigmoid", "softcap"])
def test_sigmoid_and_softcap_are_torchs_with_their_gradients(function):
    x = 20 * random(333)
    found = []
    for on in (True, False):
        given = learning(x)
        with batch_invariant(on):
            y = function(*given)
        found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("V", [1, 7, 301, 4096])
def test_log_softmax_has_the_bits_of_the_loss(V, cap):
    x, head = random(19, 33), 3 * random(V, 33, seed=1)
    targets = torch.arange(19) % V
    with batch_invariant():
        losses = linear_cross_entropy(x, head, targets, cap, "none")
        for rows in (slice(None), slice(3, 4)):
            logits = product(x[rows], head)
            logits = softcap(logits, cap) if cap else logits
            logprobs = log_softmax(logits)
            assert torch.equal(log_softmax(moved(logits, 5)), logprobs)
            assert torch.equal(logprobs.gather(1, targets[rows, None])[:, 0], -losses[rows])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1))


@both_dtypes
@pytest.mark.parametrize("D", [32, 64, 97, 160])
def test_rows_have_the_same_bits_wherever_they_lie(D, dtype):
    """In the functions that are the same with the mode and without."""
    x, residual, a, b = *random(2, 11, D, dtype=dtype), torch.tensor(0.7), torch.tensor(0.3)
    qkv, tables = random(1, 11, 6, 32, dtype=dtype, seed=3), rotary_tables(11, 32, 1e4, CPU)
    gate, embedding = random(1, 11, 2, dtype=dtype, seed=4), random(1, 11, 2, 32, dtype=dtype, seed=5)

    def results(rows, by):
        part, added = moved(x[rows], by), moved(residual[rows], by)
        of_rows = [moved(t[:, rows], by) for t in (qkv, gate, embedding)]
        inputs = attention_inputs(of_rows[0], 2, *(t[rows] for t in tables), 1.2, *of_rows[1:])
        scaled = rms_norm_residual(part, added, scales=(a, b))
        return [rms_norm(part), *rms_norm_residual(part, added), *scaled, *(t[0] for t in inputs)]

    whole = results(slice(None), 0)
    for by in (1, 3, 8):
        for rows in (slice(0, 1), slice(4, 9), slice(10, 11)):
            for part, expected in zip(results(rows, by), whole, strict=True):
                assert torch.equal(part, expected[rows])


@both_dtypes
def test_the_mlp_does_not_know_of_other_rows(dtype):
    x, w_in, w_out = (
        random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(70, 64), (256, 64), (64, 256)])
    )
    with batch_invariant():
        whole = linear_relu2(*learning(x), w_in, w_out)
        assert torch.equal(linear_relu2(x[33:34], w_in, w_out), whole[33:34])


def test_the_mode_is_of_a_thread_and_ends_with_its_block():
    x, weight, seen = random(50, 64), random(64, 64, seed=1), []
    plain = F.linear(x, weight)
    with pytest.raises(KeyError), batch_invariant():
        assert module.invariant(x) and not fusing_pays(x, weight)
        with batch_invariant(False):
            assert torch.equal(product(x, weight), plain)
        assert module.invariant(x)
        other = threading.Thread(target=lambda: seen.append(module.invariant(x)))
        other.start()
        other.join()
        raise KeyError
    assert seen == [False] and not module.invariant(x)
    assert torch.equal(product(x, weight), plain)


def test_where_there_is_no_kernel_in_c_the_mode_changes_nothing(choose_kernels):
    assert batch_invariant_works(CPU, torch.float32) and batch_invariant_works(CPU, torch.bfloat16)
    assert not batch_invariant_works(CPU, torch.float16)
    assert not batch_invariant_works(torch.device("cuda"), torch.float32)
    choose_kernels("torch")
    assert not batch_invariant_works(CPU, torch.float32)
    x, weight = random(50, 64), random(64, 64, seed=1)
    with batch_invariant():
        assert torch.equal(product(x, weight), F.linear(x, weight))


def test_the_operations_keep_the_rules_of_torch():
    x = random(5, 7).requires_grad_()
    opcheck(chosen(module._product_op), [x, random(3, 7).requires_grad_()])
    opcheck(chosen(module._softcap_op), [x, 15.0])
    opcheck(chosen(module._sigmoid_op), [x])
    given = learning(*heads(2, 9, 4, 2, 32, torch.float32))
    in_another_order = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    for inputs in (given, learning(*in_another_order)):
        opcheck(chosen(_attention_in_order), [*inputs, None, None, starts_of(2, 9), 3, 0.0, 0.2])

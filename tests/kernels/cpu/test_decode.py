"""Decoding in C: products of a few rows and attention of one token, whose rows do not know of each other."""

import pytest
import torch
from helpers.kernel_tools import as_double, chosen, error
from torch.library import opcheck

from hotlap.kernels import decode_attention as attention_module
from hotlap.kernels import decode_linear as module
from hotlap.kernels.cpu import decode_linear as cpu
from hotlap.kernels.decode_attention import decode_attention
from hotlap.kernels.decode_linear import linear_residual, linear_residual_ref, norm_linear, norm_linear_ref

pytestmark = pytest.mark.usefixtures("c_kernels")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SHAPES = [(1, 16, 40), (1, 97, 33), (2, 200, 7), (3, 64, 8), (5, 333, 70), (7, 1, 1), (16, 64, 96)]  # R, D, N


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(R, D, N, dtype):
    """x, x0, residual and weight, such that products are of size 1; and the scales of a mix."""
    x, x0, residual = (random(R, width, dtype=dtype, seed=i) for i, width in enumerate((D, D, N)))
    weight = (random(N, D, seed=3) / D**0.5).to(dtype)
    return x, x0, residual, weight, *(torch.tensor(value, dtype=dtype) for value in (1.15, 0.2))


def results(x, x0, residual, weight, a, b, gate):
    """Of every form."""
    mixed = norm_linear(x, weight, (a, b, x0), gate)
    return (*mixed, norm_linear(x, weight, squared_relu=True)[0], linear_residual(x, weight, residual))


def expected(x, x0, residual, weight, a, b, gate):
    mixed = norm_linear_ref(x, weight, (a, b, x0), gate)
    rest = norm_linear_ref(x, weight, squared_relu=True)[0], linear_residual_ref(x, weight, residual)
    return (*mixed, *rest)


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_is_as_exact_as_torch(shape, dtype, monkeypatch):
    given = (*case(*shape, dtype), random(3, min(12, shape[1]), dtype=dtype, seed=4))
    wanted = zip(expected(*given), expected(*map(as_double, given)), strict=True)
    for name in ("norm_linear_ref", "linear_residual_ref"):
        monkeypatch.setattr(module, name, None)  # nothing is computed by the reference
    for ours, (torchs, exact) in zip(results(*given), wanted, strict=True):
        assert ours.dtype == torchs.dtype
        assert error(ours, exact) <= 2 * error(torchs, exact) + 2**-20


@both_dtypes
@pytest.mark.parametrize("D, N", [(64, 96), (333, 70)])
def test_a_row_gives_the_same_bits_whatever_the_rows_beside_it(D, N, dtype):
    x, x0, residual, *weights = case(16, D, N, dtype)
    weights.append(random(3, 12, dtype=dtype, seed=4))
    together = results(x, x0, residual, *weights)
    for size in (1, 2, 3, 5, 15):
        rows = [(7 * i + size) % 16 for i in range(size)]
        some = results(x[rows], x0[rows], residual[rows], *weights)
        assert all(torch.equal(ours, whole[rows]) for ours, whole in zip(some, together, strict=True))


def test_threads_do_not_change_a_bit():
    """Of products large enough to be shared among them."""
    x, _, residual, weight, _, _ = case(16, 300, 500, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear_residual(x, weight, residual))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_sum_is_rounded_before_it_is_normalised():
    x, x0, _, weight, a, b = case(3, 100, 40, torch.bfloat16)
    y, total, _ = norm_linear(x, weight, (a, b, x0))
    assert torch.equal(total, (a.float() * x.float() + b.float() * x0.float()).bfloat16())
    assert torch.equal(y, norm_linear(total, weight)[0])


@both_dtypes
@pytest.mark.parametrize("layout", ["rows apart", "elements apart"])
def test_strides_do_not_matter(layout, dtype):
    def view(x):
        apart = torch.stack((x, torch.full_like(x, float("nan"))), 1 if layout == "rows apart" else -1)
        return apart.select(1 if layout == "rows apart" else -1, 0)

    given = (*case(4, 100, 40, dtype), random(3, 12, dtype=dtype, seed=4))
    apart = results(*(x if x.dim() == 0 else view(x) for x in given))
    assert all(map(torch.equal, apart, results(*given)))


@both_dtypes
def test_what_is_not_a_number_stays_in_its_row(dtype):
    x, _, _, weight, _, _ = case(6, 40, 33, dtype)
    x[1, 3] = float("nan")
    y, *_ = norm_linear(x, weight, squared_relu=True)
    assert y[1].isnan().all() and not y[[0, 2, 3, 4, 5]].isnan().any()


def test_no_rows_give_no_rows():
    x, x0, residual, weight, a, b = case(2, 40, 33, torch.float32)
    y, total, gates = norm_linear(x[:0], weight, (a, b, x0[:0]), weight[:4, :8])
    assert y.shape == (0, 33) and total.shape == (0, 40) and gates.shape == (0, 4)
    assert linear_residual(x[:0], weight, residual[:0]).shape == (0, 33)


def ring(B, dtype, S=64):
    """q, k, v, caches that are written everywhere, slots and lengths of sequences at any place of a ring."""
    q, k, v = (random(B, 1, heads, 32, dtype=dtype, seed=i) for i, heads in enumerate((4, 2, 2)))
    caches = random(2, B, S, 2, 32, dtype=dtype, seed=3)
    return q, k, v, caches, torch.arange(B).flip(0), torch.tensor([0, 5, 63, 64, 100, 1000])[:B]


@both_dtypes
def test_attention_of_a_sequence_has_the_same_bits_whatever_the_sequences_beside_it(dtype):
    q, k, v, caches, slots, lengths = ring(6, dtype)
    together = decode_attention(q, k, v, *caches.clone(), slots, lengths, 40, 5.0)
    for some in ([0], [4], [3, 1], [5, 2, 4]):
        new = (x[some] for x in (q, k, v))
        y = decode_attention(*new, *caches.clone(), slots[some], lengths[some], 40, 5.0)
        assert torch.equal(y, together[some])


@both_dtypes
def test_attention_has_the_same_bits_wherever_in_the_ring_the_keys_lie(dtype):
    q, k, v, caches, slots, lengths = ring(1, dtype)
    found = []
    for shift in (0, 17, 50):
        moved = caches.roll(shift, 2)
        found.append(decode_attention(q, k, v, *moved, slots, lengths + 70 + shift, 40))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_operations_keep_the_rules_of_torch():
    x, x0, residual, weight, a, b = case(3, 40, 33, torch.float32)
    product = chosen(module._decode_linear)
    opcheck(product, (x, weight, None, a, b, x0, weight[:4, :8].clone(), None, True, True))
    opcheck(product, (x, weight, *[None] * 5, residual, False, False))
    q, k, v, caches, slots, lengths = ring(3, torch.float32)
    attention = chosen(attention_module._decode_attention)
    opcheck(attention, (q, k, v, *(x.clone() for x in caches), slots, lengths, 40, 0.0, 0.25))


def test_compiles_whole_to_the_same_results():
    def function(x, x0, residual, weight, a, b):
        y, total, gates = norm_linear(x.sin(), weight, (a, b, x0), weight[:4, :8])
        return linear_residual(total, weight, residual) + y, gates

    inputs = case(3, 40, 33, torch.float32)
    compiled = torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, function(*inputs))


@pytest.mark.parametrize("faster", [1, 4, 16])
def test_blocks_use_these_products_for_as_many_rows_as_they_are_faster(faster, monkeypatch):
    """And for int8 up to 16, which no others take."""
    monkeypatch.setattr(
        cpu, "fastest", lambda question, _: "c" if f"of {faster} rows" in question else "torch"
    )
    cpu.most_rows.cache_clear()
    weight = random(64, 64)
    pays = [n for n in range(1, 20) if module.fusing_pays(random(n, 64), weight)]
    assert pays == list(range(1, faster + 1))
    assert module.fusing_pays(random(16, 64), weight.to(torch.int8))
    assert not module.fusing_pays(random(17, 64), weight.to(torch.int8))
    cpu.most_rows.cache_clear()


@both_dtypes
def test_how_many_rows_pay_is_measured_without_touching_random_numbers(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "fastest", lambda question, candidates: measured_names(candidates))
    cpu.most_rows.cache_clear()
    before = torch.get_rng_state()
    assert cpu.most_rows(dtype, 5000) == 16
    assert torch.equal(torch.get_rng_state(), before)
    cpu.most_rows.cache_clear()


def measured_names(candidates):
    """The first of the candidates, all of which were run and compute the same."""
    results = [prepare()() for prepare in candidates.values()]
    torch.testing.assert_close(results[0][0].float(), results[1].float(), rtol=2e-2, atol=2e-2)
    return next(iter(candidates))

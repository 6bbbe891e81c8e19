"""Decoding against a cache, in torch and in Triton, is attention over whole rows."""

import itertools

import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, error, far_apart, random
from torch.library import opcheck

from hotlap.kernels import decode_attention as module
from hotlap.kernels.attention import attention_ref
from hotlap.kernels.decode_attention import decode_attention

SPLIT_COUNT = module.split_count  # which the fixture replaces


@pytest.fixture(params=["torch", "c", "triton"], autouse=True)
def kernels(request, choose_kernels):
    """All paths; the Triton one with a block of 32 keys; kernels with poisoned memory."""
    if request.param == "torch":
        return choose_kernels("torch")
    if request.param == "c":
        return request.getfixturevalue("c_kernels")
    request.getfixturevalue("triton_kernels")
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(module, "_decode_split_tiles", lambda c, _: [module.Tile({"BLOCK_C": c, "BLOCK_N": 32})])
    return patch.setattr(module, "split_count", lambda *_: 3)


@pytest.fixture
def only_triton(request):
    if "triton" not in request.node.name:
        pytest.skip("of the Triton path")


def tokens(B, T, H, K, C, dtype=torch.float32):
    """q, k and v of whole rows, as views of one projection."""
    return random(B, T, H + 2 * K, C, dtype=dtype, grad=False).split((H, K, K), dim=2)


def empty_cache(slots, S, K, C, dtype=torch.float32):
    """Keys and values that reach the output where they are read before they are written: NaN."""
    return torch.full((2, slots, S, K, C), float("nan"), dtype=dtype, device=DEVICE)


def decode(q, k, v, window=None, softcap=None, steps=(1,), slots=None, S=None):
    """Rows decoded `steps` tokens at a time, in turn, through a cache."""
    B, T = q.shape[:2]
    cache = empty_cache(B + 2, S or T, *k.shape[2:], k.dtype)
    slots = torch.arange(B, device=DEVICE) if slots is None else slots
    parts, done = [], 0
    while done < T:
        n = min(steps[len(parts) % len(steps)], T - done)
        lengths = torch.full((B,), done, device=DEVICE)
        new = (x[:, done : done + n] for x in (q, k, v))
        parts.append(decode_attention(*new, *cache, slots, lengths, window, softcap))
        done += n
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "window, steps", [(5, (1,)), *itertools.product([1, 5, 40, None], [(17, 3, 1), (40,)])]
)
def test_decoding_in_any_steps_is_attention(window, steps):
    q, k, v = tokens(2, 40, 4, 2, 32)
    whole = attention_ref(q, k, v, window)
    torch.testing.assert_close(decode(q, k, v, window, steps=steps), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, steps", [(40, (25, 1, 17)), (5, (60, 3))])
def test_sequences_go_on_beyond_a_ring_that_holds_what_a_window_sees(window, steps, dtype):
    """Three times around a ring of 64, in blocks of 32."""
    q, k, v = tokens(1, 200, 2, 1, 16, dtype)
    exact = attention_ref(q.double(), k.double(), v.double(), window)
    y = decode(q, k, v, window, steps=steps, S=64)
    assert error(y, exact) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("T", [1, 3])
def test_rings_that_have_and_have_not_wrapped_share_a_call(T):
    """Rows at different places of their rings, in which only what a window may reach was ever written."""
    S, held = 64, [0, 7, 61, 64, 130, 191]
    window = S - T + 1
    B = len(held)
    q, k, v = tokens(B, 200, 4, 2, 16)
    whole, cache = attention_ref(q, k, v, window, softcap=3.0), empty_cache(B + 1, S, 2, 16)
    slots, lengths = torch.tensor([4, 0, 3, 6, 2, 1], device=DEVICE), torch.tensor(held, device=DEVICE)
    for b, n in enumerate(held):
        for p in range(max(0, n - S), n):
            cache[0, slots[b], p % S], cache[1, slots[b], p % S] = k[b, p], v[b, p]
    before = cache.clone()
    row, position = torch.arange(B, device=DEVICE)[:, None], lengths[:, None] + torch.arange(T, device=DEVICE)
    y = decode_attention(*(x[row, position] for x in (q, k, v)), *cache, slots, lengths, window, 3.0)
    torch.testing.assert_close(y, whole[row, position], rtol=1e-5, atol=1e-5)
    before[:, slots[:, None], position % S] = torch.stack((k, v))[:, row, position]
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)  # and nothing else was written


def test_a_prompt_read_in_chunks_takes_no_mask_on_a_cpu(monkeypatch):
    """Of its own length and the window's, whatever the length of the cache."""
    if DEVICE.type != "cpu" or module.use_triton(torch.empty(1)):
        pytest.skip("of CPUs")
    seen, whole = [], module.attention
    monkeypatch.setattr(module, "attention", lambda q, k, *rest: seen.append(k.shape) or whole(q, k, *rest))
    q, k, v = tokens(2, 300, 2, 1, 16)
    decode(q, k, v, 20, steps=(100,), S=128)
    assert seen == [(2, 100, 1, 16), (2, 119, 1, 16), (2, 119, 1, 16)]


def test_a_cache_too_short_is_an_error_where_lengths_are_cheap_to_read():
    if DEVICE.type != "cpu" or module.use_triton(torch.empty(1)):
        pytest.skip("of CPUs")
    (q, k, v), cache, every = tokens(2, 3, 2, 1, 16), empty_cache(2, 8, 1, 16), torch.arange(2)
    decode_attention(q, k, v, *cache, every, 5 * every)
    for window, match in ((None, "needed are 9"), (7, "needed are 9, or 9 for a window of 7")):
        with pytest.raises(ValueError, match=match):
            decode_attention(q, k, v, *cache, every, 6 * every, window)
    decode_attention(q, k, v, *cache.nan_to_num(0), every, 6 * every, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [32, 64, 80, 96, 128, 256])
def test_every_head_size_in_every_dtype(C, dtype):
    q, k, v = tokens(1, 9, 2, 1, C, dtype)
    exact = attention_ref(q.double(), k.double(), v.double())
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert error(decode(q, k, v, steps=(8, 1)), exact) < tolerance


@pytest.mark.parametrize("H, K", [(4, 1), (6, 2), (3, 3), (20, 1)])
def test_grouped_heads_and_softcap(H, K):
    q, k, v = tokens(2, 12, H, K, 16)
    y = decode(q, k, v, softcap=2.0, steps=(10, 1))
    torch.testing.assert_close(y, attention_ref(q, k, v, softcap=2.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [7, None])
@pytest.mark.parametrize("T", [1, 3])
def test_sequences_have_their_own_lengths_and_slots(T, window):
    """Lengths from nothing to a full cache, in slots out of order, of which some are not used."""
    q, k, v = tokens(4, 40, 4, 2, 16)
    whole, cache = attention_ref(q, k, v, window), empty_cache(6, 40, 2, 16)
    slots, lengths = (
        torch.tensor([5, 0, 3, 2], device=DEVICE),
        torch.tensor([0, 11, 33, 40 - T], device=DEVICE),
    )
    for b, n in enumerate(lengths.tolist()):
        cache[0, slots[b], :n], cache[1, slots[b], :n] = k[b, :n], v[b, :n]
    before = cache.clone()
    row, position = torch.arange(4, device=DEVICE)[:, None], lengths[:, None] + torch.arange(T, device=DEVICE)
    y = decode_attention(*(x[row, position] for x in (q, k, v)), *cache, slots, lengths, window)
    torch.testing.assert_close(y, whole[row, position], rtol=1e-5, atol=1e-5)
    assert torch.equal(cache[:, slots[:, None], position], torch.stack((k, v))[:, row, position])
    before[:, slots[:, None], position] = cache[:, slots[:, None], position]
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)  # and nothing else was written


def test_strides_do_not_matter():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(2, 20, 2, 2, 16))
    cache = empty_cache(2, 20, 2, 16).permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)
    every = torch.arange(2, device=DEVICE)
    y = decode_attention(q[:, :19], k[:, :19], v[:, :19], *cache, every, 0 * every)
    last = decode_attention(q[:, 19:], k[:, 19:], v[:, 19:], *cache, every, 0 * every + 19)
    whole = attention_ref(q, k, v)
    torch.testing.assert_close(torch.cat((y, last), 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_number_of_splits_does_not_matter(splits, only_triton, monkeypatch):
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    q, k, v = tokens(1, 150, 2, 1, 16)
    for window in (None, 70):
        whole = attention_ref(q, k, v, window)
        torch.testing.assert_close(decode(q, k, v, window, steps=(149, 1)), whole, rtol=1e-5, atol=1e-5)


def test_splits_fill_the_processors_and_no_more():
    gpu = module.Device("A GPU", 232448, 132)
    assert [SPLIT_COUNT(8, 4096, gpu), SPLIT_COUNT(8, 16384, gpu), SPLIT_COUNT(600, 16384, gpu)] == [
        32,
        66,
        1,
    ]
    assert SPLIT_COUNT(1, 100, gpu) == 1


@pytest.mark.xdist_group("gigabytes")
def test_slots_may_lie_beyond_two_to_the_31(only_triton):
    q, k, v = tokens(3, 6, 1, 1, 16, torch.float16)
    far, every = far_apart(k), torch.arange(3, device=DEVICE)
    for caches in ((far, torch.zeros_like(k)), (torch.zeros_like(k), far)):
        y = decode_attention(*map(far_apart, (q, k, v)), *caches, every, 0 * every)
        assert torch.equal(
            y, decode_attention(q, k, v, *empty_cache(3, 6, 1, 16, torch.float16), every, 0 * every)
        )


def test_keys_before_the_window_are_never_loaded(only_triton):
    """NaN there would reach y through its product with zeros, whichever split holds them."""
    q, k, v = tokens(1, 200, 2, 1, 16)
    k, v = k.clone(), v.clone()
    exact = attention_ref(q, k, v, 20)[:, 199:]
    k[:, :160], v[:, :160] = (
        float("nan"),
        float("nan"),
    )  # queries at 199 see keys from 180 on, in blocks of 32
    cache, first = empty_cache(1, 200, 1, 16), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    cache[0, :, :199], cache[1, :, :199] = k[:, :199], v[:, :199]
    y = decode_attention(q[:, 199:], k[:, 199:], v[:, 199:], *cache, first, first + 199, 20)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_splits_share_only_the_keys_that_are_seen(only_triton, monkeypatch):
    """Of the two blocks of the cache that a window reaches, and that of the new key, four splits take one
    each, and the last none."""
    monkeypatch.setattr(module, "split_count", lambda *_: 4)
    q, k, v = tokens(1, 300, 1, 1, 16)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    made, empty = [], torch.empty

    def kept(*size, **options):
        made.append(empty(*size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", kept)
    new = (x[:, 299:] for x in (q, k, v))
    module._decode(*new, k.clone(), v.clone(), first, first + 299, 33, 0.0, 0.25)
    lse = next(x for x in made if x.shape == (4, 1, 1, 1))  # (splits, B, K, R)
    assert lse.isfinite().flatten().tolist() == [True, True, True, False]


def test_no_sequences_give_nothing():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    q, k, v = tokens(0, 1, 2, 1, 16)
    assert decode_attention(q, k, v, *empty_cache(2, 8, 1, 16), none, none).shape == (0, 1, 2, 16)


def test_two_runs_agree_bit_for_bit():
    q, k, v = tokens(2, 60, 4, 2, 16, torch.bfloat16)
    assert torch.equal(decode(q, k, v, steps=(50, 1)), decode(q, k, v, steps=(50, 1)))


def test_the_operations_keep_the_rules_of_torch(only_triton):
    q, k, v = tokens(2, 3, 2, 1, 16)
    k_cache, v_cache = empty_cache(2, 8, 1, 16).nan_to_num(1.0)
    every = torch.arange(2, device=DEVICE)
    opcheck(module._decode_attention.registered(), (q, k, v, k_cache, v_cache, every, every, 4, 0.0, 0.25))


def test_compiles_whole_and_still_writes_the_cache(only_triton):
    def function(q, k, v, k_cache, v_cache, slots, lengths):
        return decode_attention(q.sin(), k, v, k_cache, v_cache, slots, lengths, 5).flatten(2)

    inputs, every = tokens(2, 3, 2, 1, 16), torch.arange(2, device=DEVICE)
    caches = [empty_cache(2, 8, 1, 16).nan_to_num(1.0) for _ in range(2)]
    compiled = torch.compile(function, fullgraph=True)(*inputs, *caches[0], every, every)
    torch.testing.assert_close(compiled, function(*inputs, *caches[1], every, every))
    assert torch.equal(*caches) and torch.equal(caches[0][0, 1, 1:4], inputs[1][1])


def test_wrong_arguments_are_named():
    (q, k, v), every = tokens(2, 3, 2, 1, 16), torch.arange(2, device=DEVICE)
    k_cache, v_cache = empty_cache(2, 8, 1, 16)
    for arguments, match in (
        ((q, k[:1], v, k_cache, v_cache, every, every), "q \\(2, 3, 2, 16\\), k \\(1,"),
        ((q, k, v, k_cache[..., :8], v_cache, every, every), "cache"),
        ((q, k, v, k_cache[:, :2], v_cache[:, :2], every, every), "a cache of 2"),
        ((q, k, v, k_cache, v_cache[:, :4], every, every), "need one shape"),
        ((q, k, v, k_cache, torch.stack((v_cache, v_cache), -1)[..., 0], every, every), "unit stride"),
        ((q.half(), k, v, k_cache, v_cache, every, every), "q, k, v and the caches are float16, float32"),
        ((q, k, v, k_cache, v_cache, every[:1], every), "do not fit 2 sequences"),
    ):
        with pytest.raises(ValueError, match=match):
            decode_attention(*arguments)

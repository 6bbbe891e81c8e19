"""Attention of a few new tokens against a key-value cache in which each sequence has its own length.

The keys and values of the new tokens are appended to the cache. Query t of a sequence that held n tokens is
then at n + t and sees the cache up to there, or its last `window` keys, including its own (flash-attn's
window of (window - 1, 0)). Lengths are a tensor that the host never reads, so one CUDA graph serves all
lengths.

A row of the cache is a ring: the token at position p lies at index p % S. So a sequence may be longer than
the cache of a layer with a window, which has to hold what the new tokens see, window + T - 1 tokens.

The heads that share keys, times the new tokens, are the rows of one matmul. A sequence's keys are split among
programs, whose results (y, log-sum-exp) a second kernel combines (Flash-Decoding, Dao et al.,
2023). Bound by memory: 2 n K C e bytes a sequence, for elements of e bytes.

Programs read the new keys and values where they are given, and from the cache only what it held before. So
the same kernel can append them: of what it writes there, programs of the same launch may read what replaces
keys older than every window, which they mask.
"""
# B sequences, T new tokens, S cache positions, H heads, K kv heads, C head dim
# G heads that share keys, R = G T rows, M, N rows of a block of queries, of keys

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.attention import attention
from hotlap.kernels.attention_blocks import load_rows, similarity
from hotlap.kernels.attention_blockwise import masked_softmax
from hotlap.kernels.attention_forward import RESERVE, factors, tile_for
from hotlap.kernels.attention_in_order import attention_in_order
from hotlap.kernels.batch_invariant import invariant
from hotlap.kernels.cpu import decode_attention as cpu
from hotlap.kernels.dispatch import (
    Device,
    autocast_dtype,
    device_facts,
    jit,
    kernel_op,
    launches,
    no_autocast,
    tl,
    use_c,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.tiles import Case, Tile, cdiv, next_power_of_2, type_name


def append_ref(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor
) -> None:
    """Write k and v (B, T, K, C) behind the `lengths` tokens of cache rows `slots`."""
    position = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
    index = slots[:, None], position % k_cache.shape[1]
    k_cache[index], v_cache[index] = k, v


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The specification, after `append_ref`; on a CPU, only over what the longest sequence has written."""
    B, T, H, C = q.shape
    S = k_cache.shape[1]
    scale = C**-0.5 if scale is None else scale
    if q.device.type == "cpu" and B:
        if T > 1:
            return _chunks(q, k_cache, v_cache, slots, lengths, window, softcap, scale)
        k_cache, v_cache = (cache[:, : int(lengths.max()) + T] for cache in (k_cache, v_cache))
    newest = lengths[:, None] + T - 1  # (B, 1)
    # position of each key (B, S), negative where nothing has been written yet
    key = newest - (newest - torch.arange(k_cache.shape[1], device=q.device)) % S
    query = lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
    distance = query[:, None, :, None] - key[:, None, None, :]  # (B, 1, T, S)
    mask = (distance >= 0) & (distance < (window or S)) & (key >= 0)[:, None, None, :]
    k, v = rows(k_cache, slots), rows(v_cache, slots)
    unseen = ~mask.any(2)[:, 0, :, None, None]  # (B, S, 1, 1)
    if q.device.type != "cpu" or unseen.any():  # it may be anything, and a weight of zero would not hide NaN
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not softcap:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != H)
        return y.transpose(1, 2)
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    weights = masked_softmax((q @ k.mT).float() * scale, mask, softcap)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def _chunks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float,
    scale: float,
) -> Tensor:
    """`decode_attention_ref` of several new tokens on a CPU: sequences of one length together, over the keys
    from the oldest that is seen, without a mask over the cache.
    """
    y, T, held = torch.empty(q.shape, dtype=q.dtype), q.shape[1], lengths.tolist()
    for length in dict.fromkeys(held):
        group = [b for b, n in enumerate(held) if n == length]
        oldest = max(0, length - window + 1) if window else 0
        k, v = (_span(cache, slots[group], oldest, length + T) for cache in (k_cache, v_cache))
        y[group] = attention(q[group], k, v, window, None, softcap, scale)
    return y


def _span(cache: Tensor, slots: Tensor, start: int, end: int) -> Tensor:
    """Positions start to end - 1 of rows of the cache, in order: (B, end - start, K, C)."""
    S, first = cache.shape[1], start % cache.shape[1]
    last = first + end - start
    part = rows(cache[:, first : min(last, S)], slots)
    return part if last <= S else torch.cat((part, rows(cache[:, : last - S], slots)), 1)


def rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of the cache: a view if they are adjacent and checking that is cheap, else a copy."""
    if slots.device.type == "cpu" and len(slots):
        first = int(slots[0])
        if torch.equal(slots, torch.arange(first, first + len(slots))):
            return cache[first : first + len(slots)]
    return cache[slots]


@jit
def _decode_split_kernel(
    q, k, v, k_cache, v_cache, slots, lengths, y, lse, inner, outer,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, kc_b, kc_t, kc_h, vc_b, vc_t, vc_h,
    B, T, S, H, K, window, splits, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of the keys of a sequence and kv head, for M of its rows: y (splits, B, K, R, C), lse. The
    first split appends the keys and values of these rows' tokens to the cache. A ring that wraps is a
    multiple of BLOCK_N, so that no block does.
    """
    inner, outer = tl.cast(inner, tl.float32), tl.cast(outer, tl.float32)
    program, G = tl.program_id(0), H // K
    R = G * T
    split, program = program % splits, program // splits
    h, program = (program % K).to(tl.int64), program // K
    b, start = (program % B).to(tl.int64), program // B * BLOCK_M
    r = start + tl.arange(0, BLOCK_M)
    row = tl.minimum(r, R - 1)  # rows beyond R repeat the last one, and are not stored
    held = tl.load(lengths + b).to(tl.int32)
    slot = tl.load(slots + b).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    k_cache += slot * kc_b + h * kc_h
    v_cache += slot * vc_b + h * vc_h
    c, t = tl.arange(0, BLOCK_C)[None, :], (row // G).to(tl.int64)[:, None]
    if split == 0:
        mask = ((r < R) & (r % G == 0))[:, None] & (c < C)  # each token once
        place = ((held + row // G) % S).to(tl.int64)[:, None]
        tl.store(k_cache + place * kc_t + c, tl.load(k + t * k_t + c, mask), mask)
        tl.store(v_cache + place * vc_t + c, tl.load(v + t * v_t + c, mask), mask)
    position = held + row // G  # (M,)
    first = tl.zeros_like(position)
    if WINDOWED:
        first = tl.maximum(first, position - window + 1)
    # blocks of the keys in the cache come before those of the new keys
    cached, oldest = tl.cdiv(held, BLOCK_N), tl.min(first, 0)
    begin = tl.where(oldest < held, oldest // BLOCK_N, cached + (oldest - held) // BLOCK_N)
    end = cached + tl.cdiv(tl.max(position, 0) + 1 - held, BLOCK_N)
    share = tl.cdiv(end - begin, splits)
    begin += split * share
    block = tl.load(q + b * q_b + t * q_t + (h * G + row % G)[:, None] * q_h + c, c < C, other=0.0)  # (M, C)
    a = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    l, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(begin, tl.minimum(begin + share, end)):
        new = i >= cached
        key, count = tl.where(new, i - cached, i) * BLOCK_N, tl.where(new, T, held)
        place = key
        if WINDOWED:
            place = tl.where(new, key, key % S)
        end_of_rows = place + count - key
        keys = load_rows(
            tl.where(new, k, k_cache), place, tl.where(new, k_t, kc_t), end_of_rows, True, BLOCK_N, C, BLOCK_C
        )  # (N, C)
        s = similarity(block, keys, inner, SOFTCAP)  # (M, N)
        n = key + tl.arange(0, BLOCK_N)[None, :]
        real, n = n < count, n + tl.where(new, held, 0)
        s = tl.where(real & (n <= position[:, None]) & (n >= first[:, None]), s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1) * outer)
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
        p, decay = tl.exp2(s * outer - base[:, None]), tl.exp2(m - base)
        values = load_rows(
            tl.where(new, v, v_cache), place, tl.where(new, v_t, vc_t), end_of_rows, True, BLOCK_N, C, BLOCK_C
        )  # (N, C)
        a = tl.dot(p.to(values.dtype), values, a * decay[:, None], input_precision="ieee")
        l, m = l * decay + tl.sum(p, 1), highest
    out = ((split * B + b) * K + h) * R + r
    tl.store(lse + out, m + tl.log2(tl.where(l == 0, 1.0, l)), r < R)
    a /= tl.where(l == 0, 1.0, l)[:, None]
    tl.store(y + out[:, None] * C + c, a, (r < R)[:, None] & (c < C))


@jit
def _decode_combine_kernel(
    partial, lse, y, rows, T, H, K, splits,
    EARLY: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the results of all splits into y (B, T, H, C): one of `rows` = B K R per program.

    EARLY: the kernel that follows may start now, if launched for that, as in `decode_linear_kernels.py`.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row, G = tl.program_id(0).to(tl.int64), H // K
    r, h, b = row % (G * T), row // (G * T) % K, row // (G * T * K)
    split, c = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_C)
    part = tl.load(lse + split * rows + row, split < splits, other=float("-inf"))
    weight = tl.exp2(part - tl.max(part, 0))  # the new tokens' own keys are seen, so the maximum is finite
    weight /= tl.sum(weight, 0)
    mask = (split < splits)[:, None] & (c < C)[None, :]
    parts = tl.load(partial + (split[:, None] * rows + row) * C + c[None, :], mask, other=0.0)  # (splits, C)
    out = ((b * T + r // G) * H + h * G + r % G) * C + c
    tl.store(y + out, tl.sum(parts * weight[:, None], 0).to(y.dtype.element_ty), c < C)


def _decode_split_tiles(block_c: int, _: Device) -> list[Tile]:
    """More keys in flight come closer to the memory bandwidth; blocks of 64 spill for heads of 256."""
    shapes = [(64, 4, 3), (128, 4, 2), (64, 4, 2)] if block_c <= 128 else [(32, 4, 3)]
    tiles = []
    for n, warps, stages in (*shapes, (32, 4, 2), (32, 4, 1), (16, 4, 1)):
        shared = 2 * block_c * (32 + 2 * stages * n) + RESERVE
        tiles.append(Tile({"BLOCK_C": block_c, "BLOCK_N": n}, warps, stages, shared=shared))
    return tiles


def split_count(programs: int, S: int, device: Device) -> int:
    """Number of programs per sequence: enough for four on each processor, with 128 keys each."""
    return max(1, min(4 * device.processors // programs, S // 128, 128))


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    B, T, H, C = q.shape
    S, K = k_cache.shape[1:3]
    y = _fake(q)
    if q.numel() == 0:
        return y
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    R, block_c, device = H // K * T, max(16, next_power_of_2(C)), device_facts(q.device)
    block_m = min(32, max(16, next_power_of_2(R)))
    programs = cdiv(R, block_m) * B * K
    splits = split_count(programs, S, device)
    partial = torch.empty(splits, B, K, R, C, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, B, K, R, dtype=torch.float32, device=q.device)
    tile = tile_for(_decode_split_tiles, q.device, q.dtype, q.shape[-1])
    strides = [stride for x in (q, k, v, k_cache, v_cache) for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        wrap_triton(_decode_split_kernel)[(programs * splits,)](
            q, k, v, k_cache, v_cache, slots, lengths, partial, lse, *factors(scale, softcap), *strides,
            B, T, S, H, K, window, splits, WINDOWED=window > 0, SOFTCAP=softcap > 0, C=C, BLOCK_M=block_m,
            **tile.arguments,
        )  # fmt: skip
        wrap_triton(_decode_combine_kernel)[(B * K * R,)](
            partial, lse, y, B * K * R, T, H, K, splits, EARLY=launches() and device.compute >= 90, C=C,
            BLOCK_C=block_c, BLOCK_SPLITS=next_power_of_2(splits), num_warps=4 if splits > 8 else 1,
        )  # fmt: skip
    return y


def _fake(q, *_):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_decode_attention = kernel_op(
    "decode_attention", _decode, _fake, mutates=("k_cache", "v_cache"), c=cpu.forward
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Append k and v to the cache, in place, and attend to it. For inference: no gradients.

    q: (B, T, H, C); k, v: (B, T, K, C); k_cache, v_cache: (slots, S, K, C) with unit stride over C; slots,
    lengths: (B,) integers, the cache rows of the sequences and the tokens that each holds so far. Rows
    differ, but for sequences whose result is not used. window: keys that a query sees, including its own;
    None is all. softcap, scale: as in `attention`. Returns (B, T, H, C) in q's dtype. Under `torch.autocast`,
    q, k and v are cast to the dtype of the caches.

    Rows are rings: position p lies at index p % S. lengths + T must fit S, or else window + T - 1, of which
    only a CPU, where reading lengths is cheap, raises ValueError. For a GPU, an S that sequences outgrow is a
    multiple of 128. A sequence's entries older than every window have to be finite, where it has any; what
    else lies in the cache may be anything.
    """
    if autocast_dtype(q) is not None:
        q, k, v = (x.to(k_cache.dtype) for x in (q, k, v))
    B, T, H, C = q.shape
    K = k.shape[2]
    if k.shape != (B, T, K, C) or v.shape != k.shape or k_cache.shape[2:] != (K, C) or H % K:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("cache", k_cache)))
        raise ValueError(f"{shapes}; needed are (B, T, H, C), (B, T, K, C) and (slots, S, K, C)")
    if k_cache.shape != v_cache.shape or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError("the caches of keys and values need one shape, and unit stride along the heads")
    if len({x.dtype for x in (q, k, v, k_cache, v_cache)}) > 1:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v, k_cache, v_cache))
        raise ValueError(f"q, k, v and the caches are {dtypes}; all have to be of one dtype")
    if slots.shape != (B,) or lengths.shape != (B,) or k_cache.shape[1] < T:
        raise ValueError(
            f"slots {tuple(slots.shape)}, lengths {tuple(lengths.shape)} and {T} new tokens do not fit "
            f"{B} sequences and a cache of {k_cache.shape[1]} tokens"
        )
    softcap = softcap or 0.0
    if not use_triton(q):
        _check_room(lengths, T, k_cache.shape[1], window)
    if use_triton(q) or (T == 1 and use_c(q) and not invariant(q)):
        window = window if window is not None and window <= k_cache.shape[1] else 0
        scale = C**-0.5 if scale is None else scale
        return _decode_attention(q, k, v, k_cache, v_cache, slots, lengths, window, softcap, scale)
    append_ref(k, v, k_cache, v_cache, slots, lengths)
    if invariant(q):
        window = window or 0
        return attention_in_order(q, k_cache, v_cache, slots, lengths, None, window, softcap, scale)
    with no_autocast(q):
        return decode_attention_ref(q, k_cache, v_cache, slots, lengths, window, softcap, scale)


def _check_room(lengths: Tensor, T: int, S: int, window: int | None) -> None:
    """Raise ValueError if a ring of S overwrites what the new tokens see, where that is cheap to know."""
    if lengths.device.type != "cpu" or not len(lengths) or (window and window + T - 1 <= S):
        return
    if (total := int(lengths.max()) + T) > S:
        needed = f"{total}, or {window + T - 1} for a window of {window}" if window else f"{total}"
        raise ValueError(f"a cache of {S} tokens is too short for {T} new ones: needed are {needed}")


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: one token of 32 sequences of 4096, heads of 64, 128 and 256."""
    if dtype == torch.float32:  # no tensor cores
        return []
    t = f"*{type_name(dtype)}"

    def strides(*names: str) -> dict[str, str]:
        return {f"{x}_{dimension}": "i32" for x in names for dimension in "bth"}

    split = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), t) | strides("q", "k", "v", "kc", "vc")
    split |= {"slots": "*i64", "lengths": "*i64", "y": "*fp32", "lse": "*fp32"}
    split |= {"inner": "fp64", "outer": "fp64"}
    split |= dict.fromkeys(("B", "T", "S", "H", "K", "window", "splits"), "i32")
    split |= {"WINDOWED": True, "SOFTCAP": False}
    combine = {"partial": "*fp32", "lse": "*fp32", "y": t, "BLOCK_SPLITS": 16}
    combine |= dict.fromkeys(("rows", "T", "H", "K", "splits"), "i32")

    def combine_tiles(block_c: int, _: Device) -> list[Tile]:
        return [Tile({"BLOCK_C": block_c})]

    def run(C: int, device: torch.device):
        q, k, v = (torch.randn(32, 1, n // C, C, device=device, dtype=dtype) for n in (2048, 512, 512))
        cache = torch.randn(2, 32, 4096, 512 // C, C, device=device, dtype=dtype)
        slots, lengths = torch.arange(32, device=device), torch.full((32,), 4095, device=device)
        return lambda: _decode(q, k, v, *cache, slots, lengths, 0, 0.0, C**-0.5)

    found = []
    for C in (64, 128, 256):
        start = functools.partial(run, C)
        for variant, without in (("", ()), ("early", ("sm_80", "sm_89", "gfx942"))):
            arguments = combine | {"C": C, "EARLY": variant == "early"}
            found.append(
                Case("_decode_combine_kernel", arguments, combine_tiles, C, start, variant, without=without)
            )
        for variant, m in (("", 16), ("prompt", 32)):
            blocks = {"C": C, "BLOCK_M": m}
            found.append(
                Case(
                    "_decode_split_kernel", split | blocks, _decode_split_tiles, C, start, variant, small=True
                )
            )
    return found

"""Warp-specialised forward kernel of causal attention for Hopper (FlashAttention-3, Shah et al.).

The results are those of attention_forward.py. It is written in Gluon, the lower level of Triton, where
layouts, barriers and the work of each warp are explicit. One warp of a program, the producer, only issues TMA
copies into shared memory: the queries once, keys and values into rings of STAGES buffers, which it refills
when they are released. Two warpgroups, the consumers, hold half of the M queries each. At the j-th block of
keys a consumer starts two matmuls, and works on the first result while the second runs:

    s = q k[j]^T    a += p v[j - 1]    then m' = max(m, max s), p = 2^(s - m'), and a *= 2^(m - m')

Consumers take turns starting their matmuls, so that the tensor cores work for one while the other computes
exponentials. Masked blocks come first and whole blocks after them, in two loops.

The host makes the descriptors of the tensors, (B, T, H, C) each: a program would have to write them to memory
and read them back before it starts. Compilers cannot trace them, so they see an opaque operation
(attention.py). Descriptors read zeros beyond a tensor and write nothing there, so only vectors need masks at
the end of the rows.
"""
# B batch, T queries, S keys, H heads, K kv heads, C head dim; M, N rows of a block of queries, of keys

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hotlap.common.log import log
from hotlap.kernels.attention_blocks import block_at, edges, place
from hotlap.kernels.dispatch import INTERPRETED, Device
from hotlap.kernels.tiles import Tile, type_name

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    MISSING = "Triton's interpreter has no Gluon" if INTERPRETED else ""
    if "functions_and_args" not in inspect.signature(gl.warp_specialize).parameters:  # before Triton 3.6
        MISSING = "Triton's Gluon is an older one"
except ImportError as error:
    gluon = gl = TensorDescriptor = None
    fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = None
    MISSING = str(error)


HEAD = 128  # the only head size that was measured
WARPS = 4  # of a consumer
RESERVE = 2 << 10  # bytes of shared memory for barriers and the like
SIZES = ("B", "T", "S", "H", "K", "window", "section")  # whatever their values, the code is the same


def gluon_jit(function: Callable) -> Any:
    """Gluon's jit, where there is Gluon; it also takes Triton's functions."""
    function = getattr(function, "fn", function)
    sizes = [name for name in SIZES if name in inspect.signature(function).parameters]
    return function if MISSING else gluon.jit(function, do_not_specialize=sizes)


edges, block_at, place = gluon_jit(edges), gluon_jit(block_at), gluon_jit(place)


@gluon_jit
def ring(descriptor, BUFFERS: gl.constexpr, READERS: gl.constexpr):
    """Buffers for blocks of a tensor, and two barriers for each: it is full; READERS have released it."""
    shape: gl.constexpr = [BUFFERS] + descriptor.block_shape  # noqa: RUF005
    tiles = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    filled = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return tiles, filled, free


@gluon_jit
def fill(buffers, j, descriptor, b, row, h, BUFFERS: gl.constexpr):
    """Copy the rows of a head starting at `row` as the j-th block, once its buffer is free."""
    tiles, filled, free = buffers
    mbarrier.wait(free.index(j % BUFFERS), (j // BUFFERS & 1) ^ 1)
    mbarrier.expect(filled.index(j % BUFFERS), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(
        descriptor, [b, row, h, 0], filled.index(j % BUFFERS), tiles.index(j % BUFFERS)
    )


@gluon_jit
def rows_of(buffers, i):
    """A buffer as (rows, C)."""
    tiles, _, _ = buffers
    return tiles.index(i).reshape([tiles.shape[2], tiles.shape[4]])


@gluon_jit
def take(buffers, j, BUFFERS: gl.constexpr):
    """Wait for the j-th block, (rows, C)."""
    _, filled, _ = buffers
    mbarrier.wait(filled.index(j % BUFFERS), j // BUFFERS & 1)
    return rows_of(buffers, j % BUFFERS)


@gluon_jit
def give_back(buffers, j, BUFFERS: gl.constexpr):
    """Release the buffer of the j-th block, which this consumer has finished reading."""
    _, _, free = buffers
    mbarrier.arrive(free.index(j % BUFFERS), count=1)


@gluon_jit
def write(descriptor, buffers, i, x, b, row, h):
    """Write x (rows, C) to the rows of a head starting at `row`, through a buffer that is free."""
    tiles, _, _ = buffers
    rows_of(buffers, i).store(x.to(descriptor.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(descriptor, [b, row, h, 0], tiles.index(i))


@gluon_jit
def blocks_of_keys(
    document_start, start, T, offset, window,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """As `edges`, for a block of queries. First keys do not decrease, so its first and last row are enough.

    The last block always counts as masked, so that there is one.
    """
    last = gl.minimum(start + BLOCK_M, T) - 1
    low, high = 0, 0
    if DOCUMENTS:
        low, high = gl.load(document_start + start), gl.load(document_start + last)
    if WINDOWED:
        low = gl.maximum(low, offset + start - window + 1)
        high = gl.maximum(high, offset + last - window + 1)
    begin = low // BLOCK_N
    end = gl.maximum(gl.cdiv(gl.maximum(offset + last + 1, 0), BLOCK_N), begin + 1)
    to_all = gl.minimum(gl.maximum(offset + start + 1, 0) // BLOCK_N, end - 1)
    return edges(begin, gl.cdiv(high, BLOCK_N), to_all, end)


@gluon_jit
def first_row(i, spans, BLOCK: gl.constexpr):
    """First row of the i-th block to visit; masked blocks come first."""
    begin, left, whole, masked = spans
    return gl.where(i < masked, block_at(i, begin, left, whole, True), begin + left + i - masked) * BLOCK


@gluon_jit
def keys_seen(
    document_start, start, T, offset, window,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Rows, and the first and the last key (rows,) that each sees. Rows beyond T repeat the last one."""
    row = start + gl.arange(0, ROWS, LAYOUT)
    query = gl.minimum(row, T - 1)
    position = offset + query
    first = gl.full_like(position, 0)
    if DOCUMENTS:
        first = gl.load(document_start + query)
    if WINDOWED:
        first = gl.maximum(first, position - window + 1)
    return row, first, position


@gluon_jit
def is_seen(key, first, position, BOUNDED: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """(rows, N) of the keys from `key` on. BOUNDED: there are windows or documents."""
    n = key + gl.arange(0, BLOCK_N, LAYOUT)[None, :]
    seen = n <= position[:, None]
    if BOUNDED:
        seen = seen & (n >= first[:, None])
    return seen


@gluon_jit
def _produce(
    q, k, v, shared, b, h, kv, start, spans,
    HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    queries, keys, values, _ = shared
    _, _, whole, masked = spans
    for half in gl.static_range(2):
        fill(queries, half, q, b, start + half * HALF, h, 2)
    for j in range(masked + whole):
        key = first_row(j, spans, BLOCK_N)
        fill(keys, j, k, b, key, kv, STAGES)
        fill(values, j, v, b, key, kv, STAGES)


@gluon_jit
def _softmax(s, m, l, outer):
    """p (rows, N), the new maximum and sum (rows,), and the factor 2^(m - m') for the old accumulator."""
    new = gl.maximum(m, gl.max(s, 1) * outer)
    base = gl.where(new == float("-inf"), 0.0, new)  # rows without a key yet: -inf - -inf is NaN
    p = gl.exp2(s * outer - base[:, None])
    decay = gl.exp2(m - base)
    return p, new, l * decay + gl.sum(p, 1), decay


@gluon_jit
def _attend(
    j, p, a, l, m, q, keys, values, turns, first, position, spans, outer,
    BOUNDED: gl.constexpr, HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """p of the j-th block of keys, and the accumulator with the block before it."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_RESULT: gl.constexpr = a.type.layout
    s = gl.zeros((HALF, BLOCK_N), gl.float32, OF_SCORES)
    block = take(keys, j, STAGES)
    mbarrier.wait(turns.index(ME), (j - 1) & 1)
    s = warpgroup_mma(q, block.permute((1, 0)), s, use_acc=False, is_async=True)
    block = take(values, j - 1, STAGES)
    a = warpgroup_mma(p, block, a, is_async=True)
    mbarrier.arrive(turns.index(1 - ME), count=1)
    s = warpgroup_mma_wait(1, (s,))
    give_back(keys, j, STAGES)
    if j < spans[3]:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, OF_SCORES)
        seen = is_seen(first_row(j, spans, BLOCK_N), first, position, BOUNDED, BLOCK_N, LAYOUT)
        s = gl.where(seen, s, float("-inf"))
    weights, m, l, decay = _softmax(s, m, l, outer)
    a = warpgroup_mma_wait(0, (a,))
    give_back(values, j - 1, STAGES)
    a = a * gl.convert_layout(decay, gl.SliceLayout(1, OF_RESULT))[:, None]
    return gl.convert_layout(weights.to(p.dtype), p.type.layout), a, l, m


@gluon_jit
def _consume(
    y, lse, document_start, shared, numbers,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr,
    C: gl.constexpr, HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Consumer ME of two. lse: of the head. document_start: of the batch row."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, OF_SCORES)
    BOUNDED: gl.constexpr = WINDOWED or DOCUMENTS
    queries, keys, values, turns = shared
    b, h, start, spans, T, offset, window, outer = numbers
    _, _, whole, masked = spans
    start += ME * HALF
    row, first, position = keys_seen(
        document_start, start, T, offset, window, WINDOWED, DOCUMENTS, HALF, ROWS
    )
    a = gl.zeros((HALF, C), gl.float32, OF_RESULT)
    l, m = gl.zeros((HALF,), gl.float32, ROWS), gl.full((HALF,), float("-inf"), gl.float32, ROWS)
    q = take(queries, ME, 2)
    s = gl.zeros((HALF, BLOCK_N), gl.float32, OF_SCORES)
    s = warpgroup_mma(q, take(keys, 0, STAGES).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, (s,))
    give_back(keys, 0, STAGES)
    LAYOUT: gl.constexpr = gl.SliceLayout(0, OF_SCORES)
    seen = is_seen(first_row(0, spans, BLOCK_N), first, position, BOUNDED, BLOCK_N, LAYOUT)
    weights, m, l, _ = _softmax(gl.where(seen, s, float("-inf")), m, l, outer)
    p = gl.convert_layout(weights.to(y.dtype), gl.DotOperandLayout(0, OF_RESULT, 2))
    if ME == 1:  # the other one starts
        mbarrier.arrive(turns.index(0), count=1)
    for j in range(1, masked + whole):
        p, a, l, m = _attend(
            j, p, a, l, m, q, keys, values, turns, first, position, spans, outer,
            BOUNDED, HALF, BLOCK_N, STAGES, ME,
        )  # fmt: skip
    a = warpgroup_mma(p, take(values, masked + whole - 1, STAGES), a, is_async=True)
    a = warpgroup_mma_wait(0, (a,))
    gl.store(lse + row, m + gl.log2(gl.where(l == 0, 1.0, l)), row < T)
    l = gl.convert_layout(l, gl.SliceLayout(1, OF_RESULT))[:, None]
    write(y, queries, ME, gl.where(l == 0, 0.0, a / gl.where(l == 0, 1.0, l)), b, start, h)
    tma.store_wait(0)


@gluon_jit
def _attention_forward_hopper_kernel(
    q, k, v, document_start, y, lse, outer, B, T, S, H, K, window, section,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr, C: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, k, v, y: descriptors of blocks of M / 2, N, N and M / 2 rows of a head."""
    HALF: gl.constexpr = BLOCK_M // 2
    outer, offset = gl.cast(outer, gl.float32), S - T
    blocks = gl.cdiv(T, BLOCK_M)
    head, turn = place(gl.program_id(0), section, B * H, blocks)
    b, h, start = head // H, head % H, (blocks - 1 - turn) * BLOCK_M
    lse += gl.cast(head, gl.int64) * T
    if DOCUMENTS:
        document_start += gl.cast(b, gl.int64) * T
    spans = blocks_of_keys(document_start, start, T, offset, window, WINDOWED, DOCUMENTS, BLOCK_M, BLOCK_N)
    queries, keys, values = ring(q, 2, 1), ring(k, STAGES, 2), ring(v, STAGES, 2)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    shared = (queries, keys, values, turns)
    numbers = (b, h, start, spans, T, offset, window, outer)
    gl.warp_specialize(
        [
            (_consume, (
                y, lse, document_start, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_N, STAGES, 0,
            )),
            (_consume, (
                y, lse, document_start, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_N, STAGES, 1,
            )),
            (_produce, (q, k, v, shared, b, h, h // (H // K), start, spans, HALF, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper_name(kernel: str) -> str:
    """The form for Hopper of a kernel, by name."""
    return kernel.replace("_kernel", "_hopper_kernel")


@functools.cache
def _report(why: str) -> None:
    log.info("attention: without the kernels for Hopper (%s)", why)


def hopper_tiles(
    kernel: str,
    block_c: int,
    device: Device,
    rows: Callable[[int, int, int], int],
    shapes: Sequence[tuple[int, int, int]],
) -> list[Tile]:
    """Tiles of Hopper's form: M, N and stages. rows(M, N, stages): number of rows in shared memory.

    None for other GPUs and head sizes. They come first in their tables: on an H100 they were the fastest.
    """
    if device.compute != 90 or block_c != HEAD:
        return []
    if MISSING:
        _report(MISSING)
        return []
    return [
        Tile(
            {"BLOCK_M": m, "BLOCK_N": n},
            WARPS,
            stages,
            shared=2 * block_c * rows(m, n, stages) + RESERVE,
            kernel=hopper_name(kernel),
        )
        for m, n, stages in shapes
    ]


def _strides(x: Tensor) -> list[int]:
    """Of B, T and H; where there is one of them, a stride that the TMA takes."""
    return [HEAD if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


def hopper_takes(softcap: float, *tensors: Tensor) -> bool:
    """Whether Hopper's form takes these tensors (B, T, H, C): 16-bit dtypes, each row at a multiple of 16
    bytes, as the TMA requires.
    """
    return not softcap and all(
        x.shape[-1] == HEAD
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in _strides(x))
        for x in tensors
    )


@functools.cache
def _layout(rows: int, dtype: str):
    """Layout of a block in shared memory, as the tensor cores read it."""
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, HEAD], element)


def describe(x: Tensor, rows: int):
    """The TMA descriptor of x (B, T, H, C) for copying this many rows of a head at once."""
    return TensorDescriptor(
        x, list(x.shape), [*_strides(x), 1], [1, rows, 1, HEAD], _layout(rows, type_name(x.dtype))
    )


def described(rows: dict[str, int], dtype: torch.dtype) -> dict[str, str]:
    """Triton's names of the types of descriptors, by argument: for the static gate."""
    t = type_name(dtype)
    return {name: f"tensordesc<{t}[1,{n},1,{HEAD}],{_layout(n, t)!r}>" for name, n in rows.items()}

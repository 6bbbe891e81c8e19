"""The forward kernel of causal attention, and what it shares with the backward kernels.

A program holds a block of M queries of one head and loops over the blocks of N keys that any of them sees.
With the running maximum m, the running sum l and the accumulator a, in base 2 because GPUs have
exp2 in hardware (FlashAttention-2, Dao, 2023):

    s = q k^T    m' = max(m, max s)    p = 2^(s - m')    l = 2^(m - m') l + sum p    a = 2^(m - m') a + p v

Only blocks cut by the diagonal, by the edge of a window or by the start of a document are masked. Queries
that see the most keys start first, so that no long program is left at the end.
"""
# B batch, T queries, S keys, H heads, K kv heads, C head dim; M, N rows of a block of queries, of keys

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hotlap.kernels.attention_blocks import (
    block_at,
    keys_of_rows,
    load_rows,
    query_block,
    similarity,
    store_rows,
)
from hotlap.kernels.attention_hopper import (
    HEAD,
    RESERVE,
    _attention_forward_hopper_kernel,
    describe,
    described,
    hopper_name,
    hopper_takes,
    hopper_tiles,
)
from hotlap.kernels.dispatch import Device, device_facts, jit, tl, wrap_triton
from hotlap.kernels.tiles import Case, Table, Tile, cdiv, fitting_tiles, next_power_of_2, pick_tile, type_name

LOG2E = math.log2(math.e)
LARGE, MEDIUM = 200 << 10, 128 << 10  # bytes of shared memory of a block: Hopper's, A100's
SHARED_CACHE = 32 << 20  # bytes of the L2 cache for what programs of one head share


@jit
def _attend(
    a, l, m, q, k, v, k_t, v_t, position, first, begin, left, whole, blocks, S, inner, outer,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The accumulator (M, C), the sum and the maximum (M,) after all blocks of keys that are MASKED, or not:
    begin, left and whole as `edges` returns them, and blocks, how many.
    """
    for i in range(blocks):
        key = block_at(i, begin, left, whole, MASKED) * BLOCK_N
        s = similarity(q, load_rows(k, key, k_t, S, MASKED, BLOCK_N, C, BLOCK_C), inner, SOFTCAP)  # (M, N)
        if MASKED:
            n = key + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where((n <= position[:, None]) & (n >= first[:, None]), s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * outer)
        base = new
        if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
            base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s * outer - base[:, None])
        decay = tl.exp2(m - base)
        value = load_rows(v, key, v_t, S, MASKED, BLOCK_N, C, BLOCK_C)  # (N, C)
        a = tl.dot(p.to(value.dtype), value, a * decay[:, None], input_precision="ieee")
        l, m = l * decay + tl.sum(p, 1), new
    return a, l, m


@jit
def _attention_forward_kernel(
    q, k, v, document_start, y, lse, inner, outer,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, B, T, S, H, K, window, section,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    inner, outer = tl.cast(inner, tl.float32), tl.cast(outer, tl.float32)
    b, h, start, query = query_block(tl.program_id(0), section, B, T, H, BLOCK_M)
    if DOCUMENTS:
        document_start += b * T
    position, first, begin, left, whole, masked = keys_of_rows(
        document_start, start, query, S - T, window, WINDOWED, DOCUMENTS, BLOCK_N
    )
    kv = (h // (H // K)).to(tl.int64)
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    block = load_rows(q + b * q_b + h.to(tl.int64) * q_h, start, q_t, T, True, BLOCK_M, C, BLOCK_C)  # (M, C)
    a = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    l, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    a, l, m = _attend(
        a, l, m, block, k, v, k_t, v_t, position, first, begin, left, whole, whole, S, inner, outer,
        False, SOFTCAP, C, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    a, l, m = _attend(
        a, l, m, block, k, v, k_t, v_t, position, first, begin, left, whole, masked, S, inner, outer,
        True, SOFTCAP, C, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    row = start + tl.arange(0, BLOCK_M)
    head = b * T * H + h  # of the row-major (B, T, H, C) and, with the row, of (B, H, T)
    store_rows(y + head * C, a / tl.where(l == 0, 1.0, l)[:, None], start, H * C, T, BLOCK_M, C, BLOCK_C)
    tl.store(lse + (b * H + h) * T + row, m + tl.log2(tl.where(l == 0, 1.0, l)), row < T)


Shape = tuple[int, int, int, int]  # M, N, warps, stages


def make_tiles(
    block_c: int, device: Device, rows: Callable[[int, int, int], int], shapes: Sequence[Shape]
) -> list[Tile]:
    """Tiles of the shapes. rows(M, N, stages): upper bound on rows of BLOCK_C in shared memory.

    0 for AMD, whose compiler keeps most in registers.
    """
    tiles = []
    for m, n, warps, stages in shapes:
        shared = 0 if device.warp == 64 else 2 * block_c * rows(m, n, stages) + RESERVE
        tiles.append(Tile({"BLOCK_C": block_c, "BLOCK_M": m, "BLOCK_N": n}, warps, stages, shared=shared))
    return tiles


def _attention_forward_tiles(block_c: int, device: Device) -> list[Tile]:
    """The first tile spills on no target of the static gate; the tuner tries the others, and Hopper's form.

    Eight warps need 128 rows: with fewer, Triton often has two of them compute the same scores.
    """
    large = device.shared_memory >= LARGE
    if device.warp == 64:  # AMD
        shapes = [(64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1)]
        if block_c <= 64:
            shapes = [(128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)]
        elif block_c == 128:
            shapes = [(128, 32, 4, 1), (128, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2)]
    elif block_c <= 32:
        shapes = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)]
    elif block_c == 64:
        shapes = [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2)]
    elif block_c == 128:
        shapes = [(64, 32, 4, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)]
        if large:
            shapes = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)]
        elif device.shared_memory >= MEDIUM:
            shapes = [(128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)]
    elif large:
        shapes = [(128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)]
    else:
        shapes = [(64, 32, 8, 1), (64, 16, 4, 2), (32, 32, 4, 1)]

    def rows(m: int, n: int, stages: int) -> int:
        return m + 2 * stages * n

    plain = make_tiles(block_c, device, rows, shapes)
    special = [(128, 128, 3), (128, 128, 2)]
    return hopper_tiles("_attention_forward_kernel", block_c, device, rows, special) + plain


def tile_for(table: Table, device: torch.device, dtype: torch.dtype, C: int, special: bool = False) -> Tile:
    """The tile for heads of C. special: allow forms of the kernel other than the plain one."""
    facts, size = device_facts(device), max(16, next_power_of_2(C))
    if device.type == "cuda" and dtype == torch.float32:  # tables count two bytes an element
        facts = facts._replace(shared_memory=facts.shared_memory // 2)
    tile = pick_tile(table, size, facts)
    if tile.kernel and not special:
        tile = next(plain for plain in fitting_tiles(table, size, facts) if not plain.kernel)
    return tile


def heads_in_section(rows: int, C: int, heads: int, item: int) -> int:
    """Number of heads whose keys and values, or queries and gradients, fit SHARED_CACHE."""
    return max(1, min(heads, SHARED_CACHE // (2 * rows * C * item)))


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """`inner` and `outer` of `similarity`."""
    return (scale / softcap, softcap * LOG2E) if softcap else (0.0, scale * LOG2E)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
    special: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, C), and the base-2 log-sum-exp of the scores, (B, H, T) in float32.

    Unit strides over C. document_start: contiguous int32 (B, T). window, softcap: 0 is none. special: the
    kernel may be of a form that torch cannot trace.
    """
    B, T, H, C = q.shape
    S, K = k.shape[1:3]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    special = special and hopper_takes(softcap, q, k, v)
    tile = tile_for(_attention_forward_tiles, q.device, q.dtype, C, special)
    grid = (cdiv(T, tile.blocks["BLOCK_M"]) * B * H,)
    inner, outer = factors(scale, softcap)
    sizes = (B, T, S, H, K, window, heads_in_section(S, C, B * H, q.element_size()))
    flags = {"WINDOWED": window > 0, "DOCUMENTS": document_start is not None, "C": C}
    with torch.cuda.device_of(q):
        if tile.kernel:
            of_keys, half = tile.blocks["BLOCK_N"], tile.blocks["BLOCK_M"] // 2
            _attention_forward_hopper_kernel[grid](
                describe(q, half), describe(k, of_keys), describe(v, of_keys), document_start,
                describe(y, half), lse, outer, *sizes, **flags, STAGES=tile.stages, **tile.arguments,
            )  # fmt: skip
        else:
            wrap_triton(_attention_forward_kernel)[grid](
                q, k, v, document_start, y, lse, inner, outer,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sizes,
                **flags, SOFTCAP=softcap > 0, **tile.arguments,
            )  # fmt: skip
    return y, lse


STRIDES = {f"{x}_{dimension}": "i32" for x in "qkv" for dimension in "bth"}


def cases_of(
    kernel: str,
    pointers: dict,
    numbers: tuple[str, ...],
    sizes: dict,
    table,
    run: Callable,
    dtype: torch.dtype,
    hopper: Callable[[Tile], dict],
) -> list[Case]:
    """Plain rows first, which the tuner measures; then all options at once, which takes the most registers.

    hopper: the descriptors for Hopper's form.
    """
    if dtype == torch.float32:  # no tensor core multiplies it exactly
        return []
    every = "documents, window, softcap"
    variants = [*((C, "") for C in (64, 128, 256)), *((C, every) for C in (32, 64, 80, 128))]
    found = []
    for C, variant in (*variants, (128, "documents, window"), (256, "documents, window")):
        arguments = {**pointers, **dict.fromkeys(numbers, "fp64"), **STRIDES, **sizes, "C": C}
        arguments |= {"WINDOWED": bool(variant), "DOCUMENTS": bool(variant), "SOFTCAP": variant == every}
        arguments["document_start"] = "*i32" if variant else None
        start, block_c = functools.partial(run, C, bool(variant), dtype), next_power_of_2(C)
        label = variant if block_c == C else f"{variant}, heads of {C}"
        special = C == HEAD and variant != every
        forms = {hopper_name(kernel): hopper} if special else {}
        found.append(Case(kernel, arguments, table, block_c, start, label, forms=forms))
    return found


def inputs(C: int, masks: bool, dtype: torch.dtype, device: torch.device):
    """16k tokens in rows of 4k, heads that make up a width of 2048; documents of 1k and a window of 512."""
    qkv = torch.randn(4, 4096, 3 * 2048 // C, C, device=device, dtype=dtype)
    start = torch.arange(4096, device=device, dtype=torch.int32) // 1024 * 1024
    document_start = start.expand(4, 4096).contiguous() if masks else None
    return *qkv.chunk(3, dim=2), document_start, 512 if masks else 0, 0.0, C**-0.5


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner; none in float32, which has no tensor cores."""
    t = f"*{type_name(dtype)}"
    pointers = {"q": t, "k": t, "v": t, "y": t, "lse": "*fp32"}
    sizes = dict.fromkeys(("B", "T", "S", "H", "K", "window", "section"), "i32")

    def run(C, masks, dtype, device):
        arguments = inputs(C, masks, dtype, device)
        return lambda: attention_forward(*arguments)

    def hopper(tile: Tile) -> dict[str, str]:
        half, n = tile.blocks["BLOCK_M"] // 2, tile.blocks["BLOCK_N"]
        return described({"q": half, "y": half, "k": n, "v": n}, dtype)

    return cases_of(
        "_attention_forward_kernel", pointers, ("inner", "outer"), sizes, _attention_forward_tiles,
        run, dtype, hopper,
    )  # fmt: skip

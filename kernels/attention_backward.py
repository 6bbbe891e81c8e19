"""The backward kernels of causal attention: one for dq, one for dk and dv, and no atomics.

With p = 2^(s - lse) recomputed from q and k, and the gradient dy of y (FlashAttention-2, Dao, 2023):

    delta = sum(y dy)    dv = p^T dy    ds = p (dy v^T - delta)    dq = scale ds k    dk = scale ds^T q

The first kernel holds a block of queries, like the forward kernel, and also writes delta. The second holds a
block of keys and loops over the queries that see any of them, in every head that shares the keys, so grouped
heads are summed in float32 registers. That takes seven matmuls where one kernel with atomics takes five, but
the results are deterministic.
"""
# B batch, T queries, S keys, H heads, K kv heads, C head dim; M, N rows of a block of queries, of keys

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.attention_blocks import (
    block_at,
    edges,
    keys_of_rows,
    load_rows,
    place,
    query_block,
    similarity,
    store_rows,
)
from hotlap.kernels.attention_forward import (
    LARGE,
    attention_forward,
    cases_of,
    factors,
    heads_in_section,
    inputs,
    make_tiles,
    tile_for,
)
from hotlap.kernels.attention_hopper import describe, described, hopper_takes, hopper_tiles
from hotlap.kernels.attention_hopper_backward import (
    _attention_dk_dv_hopper_kernel,
    _attention_dq_hopper_kernel,
)
from hotlap.kernels.dispatch import Device, jit, tl, wrap_triton
from hotlap.kernels.tiles import Case, Tile, cdiv, type_name


@jit
def _add_dq(
    dq, q, dy, lse, delta, k, v, k_t, v_t, position, first, begin, left, whole, blocks, S, inner, outer,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dq / scale (M, C) after all blocks of keys that are MASKED, or all that are not."""
    for i in range(blocks):
        key = block_at(i, begin, left, whole, MASKED) * BLOCK_N
        keys = load_rows(k, key, k_t, S, MASKED, BLOCK_N, C, BLOCK_C)  # (N, C)
        s = similarity(q, keys, inner, SOFTCAP)  # (M, N)
        p = tl.exp2(s * outer - lse[:, None])
        if MASKED:
            n = key + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where((n <= position[:, None]) & (n >= first[:, None]), p, 0.0)
        if SOFTCAP:
            p *= 1 - s * s
        values = load_rows(v, key, v_t, S, MASKED, BLOCK_N, C, BLOCK_C)
        ds = p * (tl.dot(dy, tl.trans(values), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@jit
def _attention_dq_kernel(
    q, k, v, document_start, y, dy, lse, delta, dq, inner, outer, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, B, T, S, H, K, window, section,
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
    kv, h = (h // (H // K)).to(tl.int64), h.to(tl.int64)
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    block = load_rows(q + b * q_b + h * q_h, start, q_t, T, True, BLOCK_M, C, BLOCK_C)  # (M, C)
    gradient = load_rows(dy + b * dy_b + h * dy_h, start, dy_t, T, True, BLOCK_M, C, BLOCK_C)
    head = (b * T * H + h) * C  # of the row-major (B, T, H, C)
    result = load_rows(y + head, start, H * C, T, True, BLOCK_M, C, BLOCK_C)
    row = start + tl.arange(0, BLOCK_M)
    of_rows = tl.sum(result.to(tl.float32) * gradient.to(tl.float32), 1)  # (M,)
    tl.store(delta + (b * H + h) * T + row, of_rows, row < T)
    total = tl.load(lse + (b * H + h) * T + row, row < T, other=0.0)
    a = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    a = _add_dq(
        a, block, gradient, total, of_rows, k, v, k_t, v_t, position, first, begin, left, whole, whole, S,
        inner, outer, False, SOFTCAP, C, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    a = _add_dq(
        a, block, gradient, total, of_rows, k, v, k_t, v_t, position, first, begin, left, whole, masked, S,
        inner, outer, True, SOFTCAP, C, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    store_rows(dq + head, a * tl.cast(scale, tl.float32), start, H * C, T, BLOCK_M, C, BLOCK_C)


@jit
def _add_dk_dv(
    dk, dv, k, v, q, dy, lse, delta, document_start, q_t, q_h, dy_t, dy_h,
    key, begin, left, whole, blocks, heads, T, offset, window, inner, outer,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv (N, C) after all blocks of the heads' queries that are MASKED, or all that are not.

    One loop over heads and blocks, because Triton's pipeliner spills with two nested loops.
    """
    for i in range(heads * blocks):
        h = (i // blocks).to(tl.int64)
        start = block_at(i % blocks, begin, left, whole, MASKED) * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        query = load_rows(q + h * q_h, start, q_t, T, MASKED, BLOCK_M, C, BLOCK_C)  # (M, C)
        gradient = load_rows(dy + h * dy_h, start, dy_t, T, MASKED, BLOCK_M, C, BLOCK_C)
        total = tl.load(lse + h * T + row, row < T, other=0.0)
        s = similarity(k, query, inner, SOFTCAP)  # (N, M)
        p = tl.exp2(s * outer - total[None, :])
        if MASKED:
            n = key + tl.arange(0, BLOCK_N)[:, None]
            seen = (n <= row[None, :] + offset) & (row[None, :] < T)
            if WINDOWED:
                seen = seen & (row[None, :] + offset - n < window)
            if DOCUMENTS:
                seen = seen & (n >= tl.load(document_start + row, row < T, other=0)[None, :])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(gradient.dtype), gradient, dv, input_precision="ieee")
        if SOFTCAP:
            p *= 1 - s * s
        of_rows = tl.load(delta + h * T + row, row < T, other=0.0)
        ds = p * (tl.dot(v, tl.trans(gradient), input_precision="ieee") - of_rows[None, :])
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@jit
def _attention_dk_dv_kernel(
    q, k, v, document_start, rows_before, dy, lse, delta, dk, dv, inner, outer, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, B, T, S, H, K, window, section,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rows_before (B, S): number of queries before the end of each key's document."""
    inner, outer = tl.cast(inner, tl.float32), tl.cast(outer, tl.float32)
    head, turn = place(tl.program_id(0), section, B * K, tl.cdiv(S, BLOCK_N))
    b, kv, offset = (head // K).to(tl.int64), (head % K).to(tl.int64), S - T
    key = turn * BLOCK_N  # the first keys, which most queries see, go first
    last = tl.minimum(key + BLOCK_N, S) - 1
    # rows of queries: any may see a key of the block from `from_any` to `to_any`, all see all in between
    from_any, from_all = tl.maximum(key - offset, 0), tl.maximum(last - offset, 0)
    to_all, to_any = T, T
    if WINDOWED:
        to_all, to_any = tl.minimum(T, key + window - offset), tl.minimum(T, last + window - offset)
    if DOCUMENTS:
        to_all = tl.minimum(to_all, tl.load(rows_before + b * S + key))
        to_any = tl.minimum(to_any, tl.load(rows_before + b * S + last))
    begin, left, whole, masked = edges(
        from_any // BLOCK_M,
        tl.cdiv(from_all, BLOCK_M),
        tl.maximum(to_all, 0) // BLOCK_M,
        tl.cdiv(tl.maximum(to_any, 0), BLOCK_M),
    )
    keys = load_rows(k + b * k_b + kv * k_h, key, k_t, S, True, BLOCK_N, C, BLOCK_C)  # (N, C)
    values = load_rows(v + b * v_b + kv * v_h, key, v_t, S, True, BLOCK_N, C, BLOCK_C)
    if DOCUMENTS:
        document_start += b * T
    dkeys, dvalues = tl.zeros((BLOCK_N, BLOCK_C), tl.float32), tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    h = kv * (H // K)  # the first of the heads that share these keys
    q += b * q_b + h * q_h
    dy += b * dy_b + h * dy_h
    lse += (b * H + h) * T
    delta += (b * H + h) * T
    dkeys, dvalues = _add_dk_dv(
        dkeys, dvalues, keys, values, q, dy, lse, delta, document_start, q_t, q_h, dy_t, dy_h,
        key, begin, left, whole, whole, H // K, T, offset, window, inner, outer,
        False, WINDOWED, DOCUMENTS, SOFTCAP, C, BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    dkeys, dvalues = _add_dk_dv(
        dkeys, dvalues, keys, values, q, dy, lse, delta, document_start, q_t, q_h, dy_t, dy_h,
        key, begin, left, whole, masked, H // K, T, offset, window, inner, outer,
        True, WINDOWED, DOCUMENTS, SOFTCAP, C, BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    head = (b * S * K + kv) * C  # of the row-major (B, S, K, C)
    store_rows(dk + head, dkeys * tl.cast(scale, tl.float32), key, K * C, S, BLOCK_N, C, BLOCK_C)
    store_rows(dv + head, dvalues, key, K * C, S, BLOCK_N, C, BLOCK_C)


def _attention_dq_tiles(block_c: int, device: Device) -> list[Tile]:
    """The first tile spills on no target of the static gate; the tuner tries the others."""
    large = device.shared_memory >= LARGE
    if device.warp == 64:  # AMD
        shapes = [(32, 16, 4, 1), (32, 32, 4, 1)]
        if block_c <= 64:
            shapes = [(128, 32, 4, 1), (64, 64, 4, 1), (64, 32, 4, 2)]
        elif block_c == 128:
            shapes = [(64, 32, 4, 1), (128, 32, 8, 1), (32, 32, 4, 1)]
    elif block_c <= 64:
        shapes = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
    elif block_c == 128:
        shapes = [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)]
        if large:
            shapes = [(64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)]
    elif large:
        shapes = [(64, 32, 8, 2), (64, 16, 8, 2)]
    else:
        shapes = [(64, 64, 8, 1), (32, 32, 4, 1), (64, 32, 8, 2), (64, 16, 8, 2)]
    plain = make_tiles(block_c, device, lambda m, n, stages: 2 * m + (2 * stages + large) * n, shapes)
    hopper = hopper_tiles(
        "_attention_dq_kernel", block_c, device, lambda m, n, stages: 3 * m + 2 * stages * n, [(128, 64, 2)]
    )
    return hopper + plain


def _attention_dk_dv_tiles(block_c: int, device: Device) -> list[Tile]:
    """As above, but a program holds N rows of keys and reads M rows of queries."""
    large = device.shared_memory >= LARGE
    if device.warp == 64:  # AMD
        shapes = [(16, 64, 8, 1), (16, 32, 8, 1)]
        if block_c <= 64:
            shapes = [(32, 128, 4, 1), (32, 128, 8, 1), (32, 64, 4, 1), (64, 64, 4, 1)]
        elif block_c == 128:
            shapes = [(16, 128, 8, 1), (16, 64, 4, 1), (32, 64, 8, 1)]
    elif block_c <= 64:
        shapes = [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)]
    elif block_c == 128:
        shapes = [(64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)]
        if large:
            shapes = [(32, 128, 8, 2), (32, 64, 4, 2), (32, 128, 8, 3), (64, 64, 8, 2)]
    elif large:
        shapes = [(16, 64, 8, 2), (32, 64, 8, 2)]
    else:
        shapes = [(64, 32, 8, 1), (32, 32, 8, 1), (16, 64, 8, 1)]
    plain = make_tiles(
        block_c, device, lambda m, n, stages: 2 * n + (max(3, 2 * stages) + 2 * large) * m, shapes
    )
    hopper = hopper_tiles(
        "_attention_dk_dv_kernel",
        block_c,
        device,
        lambda m, n, stages: 2 * n + 2 * stages * m,
        [(32, 128, 4), (32, 128, 3), (64, 128, 3), (64, 128, 2)],
    )
    return hopper + plain


def rows_before_end(document_start: Tensor, S: int) -> Tensor:
    """(B, S) int32: for each key position, the number of queries whose document starts there or before."""
    position = torch.arange(S, dtype=torch.int32, device=document_start.device)
    position = position.expand(document_start.shape[0], S).contiguous()
    return torch.searchsorted(document_start, position, right=True, out_int32=True)


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    y: Tensor,
    lse: Tensor,
    window: int,
    softcap: float,
    scale: float,
    special: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous dq, dk, dv from the inputs and outputs of `attention_forward`, and dy with unit stride over
    C.

    special: as in `attention_forward`.
    """
    B, T, H, C = q.shape
    S, K = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    special = special and hopper_takes(softcap, q, k, v, y, dy)
    flags = {"WINDOWED": window > 0, "DOCUMENTS": document_start is not None, "C": C}
    inner, outer = factors(scale, softcap)
    strides = [stride for x in (q, k, v, dy) for stride in x.stride()[:3]]
    sizes = (B, T, S, H, K, window, heads_in_section(S, C, B * H, q.element_size()))
    with torch.cuda.device_of(q):
        tile = tile_for(_attention_dq_tiles, q.device, q.dtype, C, special)
        grid = (cdiv(T, tile.blocks["BLOCK_M"]) * B * H,)
        if tile.kernel:
            half, of_keys = tile.blocks["BLOCK_M"] // 2, tile.blocks["BLOCK_N"]
            _attention_dq_hopper_kernel[grid](
                describe(q, half), describe(k, of_keys), describe(v, of_keys), document_start,
                describe(y, half), describe(dy, half), lse, delta, describe(dq, half), outer, scale, *sizes,
                **flags, STAGES=tile.stages, **tile.arguments,
            )  # fmt: skip
        else:
            wrap_triton(_attention_dq_kernel)[grid](
                q, k, v, document_start, y, dy, lse, delta, dq, inner, outer, scale, *strides, *sizes,
                **flags, SOFTCAP=softcap > 0, **tile.arguments,
            )  # fmt: skip
        sizes = (B, T, S, H, K, window, heads_in_section(T * (H // K), C, B * K, q.element_size()))
        tile = tile_for(_attention_dk_dv_tiles, q.device, q.dtype, C, special)
        grid = (cdiv(S, tile.blocks["BLOCK_N"]) * B * K,)
        ends = None if document_start is None else rows_before_end(document_start, S)
        if tile.kernel:
            half, of_queries = tile.blocks["BLOCK_N"] // 2, tile.blocks["BLOCK_M"]
            _attention_dk_dv_hopper_kernel[grid](
                describe(q, of_queries), describe(k, half), describe(v, half), ends,
                describe(dy, of_queries), lse, delta, describe(dk, half), describe(dv, half), outer, scale,
                *sizes, **flags, STAGES=tile.stages, **tile.arguments,
            )  # fmt: skip
        else:
            wrap_triton(_attention_dk_dv_kernel)[grid](
                q, k, v, document_start, ends, dy, lse, delta, dk, dv, inner, outer, scale, *strides, *sizes,
                **flags, SOFTCAP=softcap > 0, **tile.arguments,
            )  # fmt: skip
    return dq, dk, dv


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner."""
    t = f"*{type_name(dtype)}"
    pointers = {"q": t, "k": t, "v": t, "dy": t, "lse": "*fp32", "delta": "*fp32"}
    sizes = dict.fromkeys(("dy_b", "dy_t", "dy_h", "B", "T", "S", "H", "K", "window", "section"), "i32")
    numbers = ("inner", "outer", "scale")

    def run(C, masks, dtype, device):
        arguments = inputs(C, masks, dtype, device)
        y, lse = attention_forward(*arguments)
        return lambda: attention_backward(y, *arguments[:4], y, lse, *arguments[4:])

    def for_dq(tile: Tile) -> dict[str, str]:
        half, n = tile.blocks["BLOCK_M"] // 2, tile.blocks["BLOCK_N"]
        return described({**dict.fromkeys(("q", "y", "dy", "dq"), half), "k": n, "v": n}, dtype)

    def for_dk_dv(tile: Tile) -> dict[str, str]:
        half, m = tile.blocks["BLOCK_N"] // 2, tile.blocks["BLOCK_M"]
        return described({**dict.fromkeys(("k", "v", "dk", "dv"), half), "q": m, "dy": m}, dtype)

    return [
        *cases_of(
            "_attention_dq_kernel", {**pointers, "y": t, "dq": t}, numbers, sizes,
            _attention_dq_tiles, run, dtype, for_dq,
        ),
        *cases_of(
            "_attention_dk_dv_kernel", {**pointers, "rows_before": "*i32", "dk": t, "dv": t}, numbers, sizes,
            _attention_dk_dv_tiles, run, dtype, for_dk_dv,
        ),
    ]  # fmt: skip

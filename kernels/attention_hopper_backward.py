"""Warp-specialised backward kernels of causal attention for Hopper: one for dq, one for dk and dv.

attention_backward.py has the math; attention_hopper.py explains how warps share the work: a producer copies
blocks into rings, and each of two consumers holds half of the program's rows. The first kernel keeps queries,
dy and y in shared memory, computes delta from them, and has rings of keys and values; the second keeps keys
and values, and has rings of queries and dy.
"""
# B batch, T queries, S keys, H heads, K kv heads, C head dim; M, N rows of a block of queries, of keys

from __future__ import annotations

from hotlap.kernels.attention_hopper import (
    blocks_of_keys,
    edges,
    fence_async_shared,
    fill,
    first_row,
    give_back,
    gl,
    gluon_jit,
    is_seen,
    keys_seen,
    place,
    ring,
    take,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
    write,
)


@gluon_jit
def _produce_keys(
    q, dy, y, k, v, shared, b, h, kv, start, spans,
    HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    queries, gradients, results, keys, values = shared
    _, _, whole, masked = spans
    for half in gl.static_range(2):
        fill(results, half, y, b, start + half * HALF, h, 2)
        fill(gradients, half, dy, b, start + half * HALF, h, 2)
        fill(queries, half, q, b, start + half * HALF, h, 2)
    for j in range(masked + whole):
        key = first_row(j, spans, BLOCK_N)
        fill(keys, j, k, b, key, kv, STAGES)
        fill(values, j, v, b, key, kv, STAGES)


@gluon_jit
def _add_dq(
    j, a, q, dy, lse, delta, keys, values, first, position, spans, outer,
    MASKED: gl.constexpr, BOUNDED: gl.constexpr,
    HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq / scale (rows, C) with the j-th block of keys."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros((HALF, BLOCK_N), gl.float32, OF_SCORES)
    k = take(keys, j, STAGES)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    v = take(values, j, STAGES)
    dp = warpgroup_mma(dy, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    p = gl.exp2(s * outer - lse[:, None])
    if MASKED:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, OF_SCORES)
        p = gl.where(is_seen(first_row(j, spans, BLOCK_N), first, position, BOUNDED, BLOCK_N, LAYOUT), p, 0.0)
    dp = warpgroup_mma_wait(0, (dp,))
    give_back(values, j, STAGES)
    ds = (p * (dp - delta[:, None])).to(keys[0].dtype)
    a = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, a.type.layout, 2)), k, a, is_async=True)
    a = warpgroup_mma_wait(0, (a,))
    give_back(keys, j, STAGES)
    return a


@gluon_jit
def _consume_keys(
    dq, lse, delta, document_start, shared, numbers,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr,
    C: gl.constexpr, HALF: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Consumer ME of two. lse, delta: of the head. document_start: of the batch row."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, OF_SCORES)
    BOUNDED: gl.constexpr = WINDOWED or DOCUMENTS
    queries, gradients, results, keys, values = shared
    b, h, start, spans, T, offset, window, outer, scale = numbers
    _, _, whole, masked = spans
    start += ME * HALF
    row, first, position = keys_seen(
        document_start, start, T, offset, window, WINDOWED, DOCUMENTS, HALF, ROWS
    )
    total = gl.load(lse + row, row < T, other=0.0)
    y, dy = take(results, ME, 2), take(gradients, ME, 2)
    of_rows = gl.sum(y.load(OF_RESULT).to(gl.float32) * dy.load(OF_RESULT).to(gl.float32), 1)
    of_rows = gl.convert_layout(of_rows, ROWS)
    gl.store(delta + row, of_rows, row < T)
    a = gl.zeros((HALF, C), gl.float32, OF_RESULT)
    q = take(queries, ME, 2)
    for j in range(masked):
        a = _add_dq(
            j, a, q, dy, total, of_rows, keys, values, first, position, spans, outer,
            True, BOUNDED, HALF, BLOCK_N, STAGES,
        )  # fmt: skip
    for j in range(masked, masked + whole):
        a = _add_dq(
            j, a, q, dy, total, of_rows, keys, values, first, position, spans, outer,
            False, BOUNDED, HALF, BLOCK_N, STAGES,
        )  # fmt: skip
    write(dq, results, ME, a * scale, b, start, h)
    tma.store_wait(0)


@gluon_jit
def _attention_dq_hopper_kernel(
    q, k, v, document_start, y, dy, lse, delta, dq, outer, scale, B, T, S, H, K, window, section,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr, C: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, k, v, y, dy, dq: descriptors of blocks of a head, N rows of k and v and M / 2 of the others."""
    HALF: gl.constexpr = BLOCK_M // 2
    outer, scale, offset = gl.cast(outer, gl.float32), gl.cast(scale, gl.float32), S - T
    blocks = gl.cdiv(T, BLOCK_M)
    head, turn = place(gl.program_id(0), section, B * H, blocks)
    b, h, start = head // H, head % H, (blocks - 1 - turn) * BLOCK_M
    lse += gl.cast(head, gl.int64) * T
    delta += gl.cast(head, gl.int64) * T
    if DOCUMENTS:
        document_start += gl.cast(b, gl.int64) * T
    spans = blocks_of_keys(document_start, start, T, offset, window, WINDOWED, DOCUMENTS, BLOCK_M, BLOCK_N)
    queries, gradients, results = ring(q, 2, 1), ring(dy, 2, 1), ring(y, 2, 1)
    keys, values = ring(k, STAGES, 2), ring(v, STAGES, 2)
    fence_async_shared()
    shared = (queries, gradients, results, keys, values)
    numbers = (b, h, start, spans, T, offset, window, outer, scale)
    gl.warp_specialize(
        [
            (_consume_keys, (
                dq, lse, delta, document_start, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_N, STAGES, 0,
            )),
            (_consume_keys, (
                dq, lse, delta, document_start, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_N, STAGES, 1,
            )),
            (_produce_keys, (
                q, dy, y, k, v, shared, b, h, h // (H // K), start, spans, HALF, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon_jit
def _produce_queries(
    k, v, q, dy, shared, b, kv, heads, start, spans,
    HALF: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    keys, values, queries, gradients = shared
    _, _, whole, masked = spans
    for half in gl.static_range(2):
        fill(keys, half, k, b, start + half * HALF, kv, 2)
        fill(values, half, v, b, start + half * HALF, kv, 2)
    for h in range(heads):
        for i in range(masked + whole):
            j, row = h * (masked + whole) + i, first_row(i, spans, BLOCK_M)
            fill(queries, j, q, b, row, kv * heads + h, STAGES)
            fill(gradients, j, dy, b, row, kv * heads + h, STAGES)


@gluon_jit
def _add_dk_dv(
    j, row, dk, dv, k, v, lse, delta, queries, gradients, first, last, T, outer,
    MASKED: gl.constexpr, HALF: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk / scale and dv (rows, C) with the j-th block, the queries starting at `row`.

    first, last (rows,): of the queries that see each key. lse, delta: of their head.
    """
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    BESIDE: gl.constexpr = BLOCK_M <= 32  # with more queries, s and dp do not fit the registers together
    zero = gl.zeros((HALF, BLOCK_M), gl.float32, OF_SCORES)
    row += gl.arange(0, BLOCK_M, gl.SliceLayout(0, OF_SCORES))
    total = gl.load(lse + row, row < T, other=0.0) if MASKED else gl.load(lse + row)
    q = take(queries, j, STAGES)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    if BESIDE:
        dy = take(gradients, j, STAGES)
        dp = warpgroup_mma(v, dy.permute((1, 0)), zero, use_acc=False, is_async=True)
        of_rows = gl.load(delta + row, row < T, other=0.0) if MASKED else gl.load(delta + row)
        s = warpgroup_mma_wait(1, (s,))
    else:
        s = warpgroup_mma_wait(0, (s,))
    p = gl.exp2(s * outer - total[None, :])
    if MASKED:
        p = gl.where((row[None, :] >= first[:, None]) & (row[None, :] <= last[:, None]), p, 0.0)
    rounded = gl.convert_layout(p.to(q.dtype), LEFT)
    if not BESIDE:
        dy = take(gradients, j, STAGES)
        dp = warpgroup_mma(v, dy.permute((1, 0)), zero, use_acc=False, is_async=True)
    dv = warpgroup_mma(rounded, dy, dv, is_async=True)
    if not BESIDE:
        of_rows = gl.load(delta + row, row < T, other=0.0) if MASKED else gl.load(delta + row)
    dp = warpgroup_mma_wait(1, (dp,))
    ds = (p * (dp - of_rows[None, :])).to(q.dtype)
    dk = warpgroup_mma(gl.convert_layout(ds, LEFT), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, (dv,))
    give_back(gradients, j, STAGES)
    dk = warpgroup_mma_wait(0, (dk,))
    give_back(queries, j, STAGES)
    return dk, dv


@gluon_jit
def _consume_queries(
    dk, dv, lse, delta, rows_before, shared, numbers,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr,
    C: gl.constexpr, HALF: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Consumer ME of two. lse, delta: of the first head. rows_before: of the batch row."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OF_RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    keys, values, queries, gradients = shared
    b, kv, heads, start, spans, T, S, window, outer, scale = numbers
    _, _, whole, masked = spans
    start += ME * HALF
    n = start + gl.arange(0, HALF, gl.SliceLayout(1, OF_SCORES))
    first = n - (S - T)  # of the queries that see each key
    last = gl.full_like(first, 0) + (T - 1)
    if DOCUMENTS:
        last = gl.load(rows_before + n, n < S, other=0) - 1
    if WINDOWED:
        last = gl.minimum(last, first + window - 1)
    a, c = gl.zeros((HALF, C), gl.float32, OF_RESULT), gl.zeros((HALF, C), gl.float32, OF_RESULT)
    k, v = take(keys, ME, 2), take(values, ME, 2)
    for h in range(heads):
        for i in range(masked):
            a, c = _add_dk_dv(
                h * (masked + whole) + i, first_row(i, spans, BLOCK_M), a, c, k, v, lse, delta,
                queries, gradients, first, last, T, outer, True, HALF, BLOCK_M, STAGES,
            )  # fmt: skip
        for i in range(masked, masked + whole):
            a, c = _add_dk_dv(
                h * (masked + whole) + i, first_row(i, spans, BLOCK_M), a, c, k, v, lse, delta,
                queries, gradients, first, last, T, outer, False, HALF, BLOCK_M, STAGES,
            )  # fmt: skip
        lse += T
        delta += T
    write(dk, keys, ME, a * scale, b, start, kv)
    write(dv, values, ME, c, b, start, kv)
    tma.store_wait(0)


@gluon_jit
def _attention_dk_dv_hopper_kernel(
    q, k, v, rows_before, dy, lse, delta, dk, dv, outer, scale, B, T, S, H, K, window, section,
    WINDOWED: gl.constexpr, DOCUMENTS: gl.constexpr, C: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, k, v, dy, dk, dv: descriptors of blocks of a head, M rows of q and dy and N / 2 of the others.

    rows_before (B, S): number of queries before the end of each key's document.
    """
    HALF: gl.constexpr = BLOCK_N // 2
    outer, scale, offset, heads = gl.cast(outer, gl.float32), gl.cast(scale, gl.float32), S - T, H // K
    head, turn = place(gl.program_id(0), section, B * K, gl.cdiv(S, BLOCK_N))
    b, kv, start = head // K, head % K, turn * BLOCK_N
    last = gl.minimum(start + BLOCK_N, S) - 1
    from_any, from_all = gl.maximum(start - offset, 0), gl.maximum(last - offset, 0)
    to_all, to_any = T, T
    if WINDOWED:
        to_all, to_any = gl.minimum(T, start + window - offset), gl.minimum(T, last + window - offset)
    if DOCUMENTS:
        rows_before += gl.cast(b, gl.int64) * S
        to_all = gl.minimum(to_all, gl.load(rows_before + start))
        to_any = gl.minimum(to_any, gl.load(rows_before + last))
    spans = edges(
        from_any // BLOCK_M,
        gl.cdiv(from_all, BLOCK_M),
        gl.maximum(to_all, 0) // BLOCK_M,
        gl.cdiv(gl.maximum(to_any, 0), BLOCK_M),
    )
    of_head = gl.cast(b * H + kv * heads, gl.int64) * T
    lse += of_head
    delta += of_head
    keys, values = ring(k, 2, 1), ring(v, 2, 1)
    queries, gradients = ring(q, STAGES, 2), ring(dy, STAGES, 2)
    fence_async_shared()
    shared = (keys, values, queries, gradients)
    numbers = (b, kv, heads, start, spans, T, S, window, outer, scale)
    gl.warp_specialize(
        [
            (_consume_queries, (
                dk, dv, lse, delta, rows_before, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_M, STAGES, 0,
            )),
            (_consume_queries, (
                dk, dv, lse, delta, rows_before, shared, numbers,
                WINDOWED, DOCUMENTS, C, HALF, BLOCK_M, STAGES, 1,
            )),
            (_produce_queries, (k, v, q, dy, shared, b, kv, heads, start, spans, HALF, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

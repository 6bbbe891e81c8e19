"""What the kernels of causal attention share: rows of a head, scores, and the visible blocks of keys.

Programs loop over the blocks that any of their rows sees. Blocks cut by the diagonal, by the edge of a window
or by the start of a document are masked; the others are whole.
"""
# B batch, T queries, S keys, H heads, C head dim; M, N rows of a block of queries, of keys

from __future__ import annotations

from hotlap.kernels.dispatch import jit, tl
from hotlap.kernels.tanh import tanh


@jit
def load_rows(
    base, first, stride, rows, CHECKED: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of a head starting at `first`, (ROWS, BLOCK): zero beyond C and, if CHECKED, beyond `rows`."""
    row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    pointer = base + tl.cast(first, tl.int64) * stride + (row * stride + c)
    if CHECKED:
        mask = first + row < rows
        if C < BLOCK:
            mask = mask & (c < C)
        x = tl.load(pointer, mask, other=0.0)
    elif C < BLOCK:
        x = tl.load(pointer, c < C, other=0.0)
    else:
        x = tl.load(pointer)
    return x


@jit
def store_rows(base, x, first, stride, rows, ROWS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Write (ROWS, BLOCK) to the rows of a head starting at `first`, in the dtype of `base`."""
    row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    pointer = base + tl.cast(first, tl.int64) * stride + (row * stride + c)
    mask = first + row < rows
    if C < BLOCK:
        mask = mask & (c < C)
    tl.store(pointer, x.to(base.dtype.element_ty), mask)


@jit
def similarity(a, b, inner, SOFTCAP: tl.constexpr):
    """a b^T in float32; with a softcap, tanh(inner a b^T). Times `outer` it is the score in base 2.

    In 16 bits the weights are rounded by more than any tanh is off, so the shortest one is taken.
    """
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        s = tanh(inner * s) if a.dtype == tl.float32 else 2 * tl.sigmoid(2 * inner * s) - 1
    return s


@jit
def edges(from_any, from_all, to_all, to_any):
    """The blocks from_any, ..., to_any - 1, of which from_all, ..., to_all - 1 need no mask, as four numbers:
    the first block, the masked ones at the left, the whole ones after them, and all masked ones.
    """
    left = tl.maximum(tl.minimum(from_all, to_any) - from_any, 0)
    whole = tl.maximum(to_all - from_any - left, 0)
    return from_any, left, whole, tl.maximum(to_any - from_any - whole, 0)


@jit
def block_at(i, begin, left, whole, MASKED: tl.constexpr):
    """The i-th of the masked blocks at both edges, or of the whole blocks between them."""
    return begin + i + tl.where(i < left, 0, whole) if MASKED else begin + left + i


@jit
def place(program, section, heads, blocks):
    """The head, over all batches, and which of its blocks a program works on.

    Heads are grouped into sections whose shared operands fit the L2 cache; in a section all heads go through
    their blocks side by side.
    """
    past = program // (section * blocks) * section  # heads of the sections before
    size = tl.minimum(section, heads - past)
    rest = program - past * blocks
    return past + rest % size, rest // size


@jit
def query_block(program, section, B, T, H, BLOCK_M: tl.constexpr):
    """Batch, head, first row and rows (M,) of the block of queries that a program works on. program: in the
    order in which programs start.

    The last queries, which see the most keys, go first. Rows beyond T repeat the last one, so they need no
    mask until they are stored.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    head, turn = place(program, section, B * H, blocks)
    start = (blocks - 1 - turn) * BLOCK_M
    return (head // H).to(tl.int64), head % H, start, tl.minimum(start + tl.arange(0, BLOCK_M), T - 1)


@jit
def keys_of_rows(
    document_start, start, query, offset, window,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Positions and first keys (M,) of a block of queries, and the blocks of keys as `edges` returns them."""
    position = offset + query
    first = tl.zeros_like(position)
    if WINDOWED:
        first = tl.maximum(first, position - window + 1)
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(document_start + query))
    begin, left, whole, masked = edges(
        tl.min(first, 0) // BLOCK_N,
        tl.cdiv(tl.max(first, 0), BLOCK_N),
        tl.maximum(offset + start + 1, 0) // BLOCK_N,
        tl.cdiv(tl.maximum(tl.max(position, 0) + 1, 0), BLOCK_N),
    )
    return position, first, begin, left, whole, masked

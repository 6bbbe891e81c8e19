"""Embedding: rows of a table, y[i] = weight[ids[i]], in the compute dtype.

The gradient of a row is the sum of the gradients of the tokens with its id, hundreds of them if the id is
frequent, so it is computed in float32. The tokens are sorted by id, once for all tables of a model. The
tokens of an id are then a run, which one program adds up in a fixed order: there are no atomics, and results
agree bit for bit.

Bound by memory. Bytes for N tokens of D elements of e bytes, a float32 table of V rows, U of which occur:
forward (4 + e) N D, of which rows read again may come from a cache; backward e N D + 4 V D for a gradient of
its own, and e N D + 8 U D where it is added to one that exists. N D additions.
"""
# N tokens, V vocab, D width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.dispatch import (
    DTYPES,
    Device,
    device_facts,
    jit,
    kernel_op,
    tl,
    traced,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.tiles import Case, Tile, as_rows, cdiv, next_power_of_2, pick_tile, type_name


def embedding_ref(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The specification."""
    return F.embedding(ids, weight).to(dtype)


@jit
def _embedding_forward_kernel(
    weight, ids, y, stride, N, V, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    id = tl.load(ids + token, token < N, other=0).to(tl.int64)
    known = (id >= 0) & (id < V)
    written = (token < N)[:, None] & (column < D)
    # a kernel cannot raise: NaN shows that an id is out of range
    row = tl.load(weight + id[:, None] * stride + column, written & known[:, None], other=float("nan"))
    tl.store(y + token.to(tl.int64)[:, None] * D + column, row.to(y.dtype.element_ty), written)


@jit
def _embedding_backward_kernel(
    dy, tokens, first, grad, stride, D, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # One program per id and block of columns. ADD: to grad, and only rows of ids that occur.
    blocks = tl.cdiv(D, BLOCK)
    id = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(first + id), tl.load(first + id + 1)
    at = grad + id.to(tl.int64) * D + column
    written = column < D
    if ADD:
        written &= begin < end
        before = tl.load(at, written, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, ROWS):
        i = start + tl.arange(0, ROWS)
        token = tl.load(tokens + i, i < end, other=0).to(tl.int64)
        mask = (i < end)[:, None] & (column < D)[None, :]
        part = tl.load(dy + token[:, None] * stride + column[None, :], mask, other=0.0)  # (ROWS, BLOCK)
        total += tl.sum(part.to(tl.float32), 0)
    if ADD:
        total += before
    tl.store(at, total.to(grad.dtype.element_ty), written)


def _tiles(width: int, sizes: tuple[tuple[int, int, int], ...]) -> list[Tile]:
    """sizes: columns, elements and warps of a program. Narrow tables have more rows instead."""
    return [
        Tile({"ROWS": elements // min(width, columns), "BLOCK": min(width, columns)}, warps)
        for columns, elements, warps in sizes
    ]


def _embedding_forward_tiles(width: int, _: Device) -> list[Tile]:
    return _tiles(width, ((512, 2048, 4), (512, 4096, 4), (1024, 2048, 4), (1024, 4096, 8)))


def _embedding_backward_tiles(width: int, _: Device) -> list[Tile]:
    return _tiles(
        width,
        ((512, 8192, 4), (512, 4096, 2), (512, 8192, 2), (256, 8192, 4), (1024, 8192, 4), (512, 16384, 8)),
    )


def token_runs(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tokens sorted by id, for the backward passes of all tables that are read with these ids.

    Returns tokens (N,) int64, places in ids.flatten(), those of an id in their order; and first (V + 1,)
    int32: the run of id v is tokens[first[v] : first[v + 1]]. None where no gradient is wanted, or by torch.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad and use_triton(weight)):
        return None
    sorted_ids, tokens = ids.flatten().int().sort(stable=True)  # 32 bits are sorted in half as many passes
    every = torch.arange(weight.shape[0] + 1, dtype=torch.int32, device=ids.device)
    return tokens, torch.searchsorted(sorted_ids, every, out_int32=True)


def _forward(
    weight: Tensor,
    ids: Tensor,
    tokens: Tensor | None,
    first: Tensor | None,
    dtype: torch.dtype,
    accumulate: bool,
) -> Tensor:
    """The rows. All but weight, ids and dtype is for the gradient."""
    y, (V, D), N = _fake(weight, ids, tokens, first, dtype, accumulate), weight.shape, ids.numel()
    if y.numel():
        weight, ids = as_rows(weight), ids.reshape(-1).contiguous()
        tile = pick_tile(_embedding_forward_tiles, next_power_of_2(D), device_facts(y.device))
        with torch.cuda.device_of(y):
            grid = (cdiv(N, tile.blocks["ROWS"]), cdiv(D, tile.blocks["BLOCK"]))
            wrap_triton(_embedding_forward_kernel)[grid](
                weight, ids, y, weight.stride(0), N, V, D, **tile.arguments
            )
    return y


def _fake(weight, ids, tokens, first, dtype, accumulate) -> Tensor:
    return torch.empty((*ids.shape, weight.shape[1]), dtype=dtype, device=weight.device)


def _sum_runs(dy: Tensor, tokens: Tensor, first: Tensor, grad: Tensor, add: bool) -> None:
    """Write into grad (V, D), contiguous, the sums of the rows of dy with each id, or add them to it."""
    V, D = grad.shape
    if not grad.numel():
        return
    dy = as_rows(dy)
    tile = pick_tile(_embedding_backward_tiles, next_power_of_2(D), device_facts(grad.device))
    with torch.cuda.device_of(grad):
        grid = (V * cdiv(D, tile.blocks["BLOCK"]),)
        wrap_triton(_embedding_backward_kernel)[grid](
            dy, tokens, first, grad, dy.stride(0), D, ADD=add, **tile.arguments
        )


def _backward(dy: Tensor, tokens: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    grad = _fake_gradient(dy, tokens, first, dtype)
    _sum_runs(dy, tokens, first, grad, False)
    return grad


def _fake_gradient(dy, tokens, first, dtype) -> Tensor:
    return torch.empty((first.shape[0] - 1, dy.shape[-1]), dtype=dtype, device=dy.device)


def _add(grad: Tensor, dy: Tensor, tokens: Tensor, first: Tensor) -> None:
    _sum_runs(dy, tokens, first, grad, True)


def _save(ctx, inputs, output):
    weight, _, tokens, first, _, accumulate = inputs
    ctx.save_for_backward(tokens, first)
    ctx.dtype, ctx.table = weight.dtype, weight if accumulate else None


def _gradient(ctx, dy):
    runs = ctx.saved_tensors
    if ctx.table is not None and _adds_in_place(ctx.table):
        _embedding_add(ctx.table.grad, dy, *runs)
        return (None,) * 6
    return _embedding_backward(dy, *runs, ctx.dtype), None, None, None, None, None


def _adds_in_place(weight: Tensor) -> bool:
    """Whether a gradient exists that autograd too would add to in place, and that the kernel can write."""
    if traced() or torch.is_grad_enabled() or not weight.is_leaf or (grad := weight.grad) is None:
        return False
    plain = type(grad) is Tensor and grad.layout == torch.strided and not grad.requires_grad
    return plain and grad.dtype == weight.dtype and grad.is_contiguous()


_embedding_backward = kernel_op("embedding_backward", _backward, _fake_gradient)
_embedding_add = kernel_op("embedding_add", _add, lambda grad, dy, tokens, first: None, mutates=("grad",))
_embedding = kernel_op("embedding", _forward, _fake, _save, _gradient)


def embedding(
    ids: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    runs: tuple[Tensor, Tensor] | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The rows (..., D) of weight (V, D) at ids (...), integers, rounded once to dtype.

    An id out of range raises IndexError on a CPU. A Triton kernel cannot raise: it gives a row of NaN, and no
    gradient. runs: `token_runs(ids, weight)`, where several tables share them.

    accumulate: where weight.grad exists, the backward pass of the kernels adds to it in place, and returns
    None for weight. Each micro-batch after the first then reads and writes only the rows of ids that occur,
    and no (V, D) gradient is made to be added to the sum. The result is what autograd would have added, in
    place as well. Autograd still gets the gradient if weight.grad has another dtype or strides, if gradients
    are to be differentiated, and if the pass is compiled. Nothing else sees what was added: a hook on weight
    is given None, and torch.autograd.grad(y, weight) adds to weight.grad and finds None. So do not ask for
    it where hooks reduce gradients (DDP, FSDP).
    """
    if not use_triton(weight) or dtype not in DTYPES:
        return embedding_ref(ids, weight, dtype)
    tokens, first = runs or token_runs(ids, weight) or (None, None)
    return _embedding(weight, ids, tokens, first, dtype, accumulate)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: the table of d24, and tokens as frequent as words are."""
    t, V, D, N = f"*{type_name(dtype)}", 32768, 1536, 16384
    width = next_power_of_2(D)
    forward = {"weight": "*fp32", "ids": "*i64", "y": t} | dict.fromkeys(("stride", "N", "V", "D"), "i32")
    backward = {"dy": t, "tokens": "*i64", "first": "*i32", "grad": "*fp32", "stride": "i32", "D": "i32"}

    def data(device):
        ids = (V ** torch.rand(N, device=device)).long() - 1  # Zipf's law
        return ids, torch.randn(V, D, device=device, requires_grad=True)

    def run_forward(device):
        ids, weight = data(device)
        return lambda: _forward(weight, ids, None, None, dtype, False)

    def run_backward(device, add):
        ids, weight = data(device)
        runs, dy, grad = (
            token_runs(ids, weight),
            torch.randn(N, D, device=device, dtype=dtype),
            weight.detach(),
        )
        return lambda: _sum_runs(dy, *runs, grad, add)

    return [Case("_embedding_forward_kernel", forward, _embedding_forward_tiles, width, run_forward)] + [
        Case(
            "_embedding_backward_kernel",
            backward | {"ADD": add},
            _embedding_backward_tiles,
            width,
            lambda device, add=add: run_backward(device, add),
            "add" if add else "",
        )
        for add in (False, True)
    ]

"""The output head's matmul and the cross-entropy of its softcapped logits in one operation.

At a vocabulary of 32768 the logits take more memory than all other activations of a model together, so only
one chunk of rows exists at a time. For a sum or mean of the losses, the gradients of a chunk are computed
while its logits are there, and the backward pass only scales them: 6 N D V FLOPs, as without chunks. For
per-token losses, whose gradients are not known yet, the backward pass recomputes the logits: 8 N D V. A
frozen head, beside LoRA's adapters, saves 2 N D V of them, and dW.

The parts of dW are summed in float32, 8 D V bytes per chunk, so chunks are as large as memory allows. The
operation is opaque to compilers, which would copy what it overwrites and have no bfloat16 matmul that adds to
float32.
"""
# N tokens, D width, V vocab

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.batch_invariant import product
from hotlap.kernels.cpu.library import run
from hotlap.kernels.cross_entropy import (
    IGNORE,
    cross_entropy_both,
    cross_entropy_forward,
    cross_entropy_ref,
    reduce,
)
from hotlap.kernels.dispatch import autocast, kernel_op, use_c, use_triton

# Bytes of logits in a chunk. CPU: what stays in its cache. GPU: 4096 rows of 32768 words, where summing the
# parts of dW takes 8 % of the matmuls' time on an H100 (calculated, not measured). Twice as many took more
# than a fifth of the memory of a compiled loss over all logits (0.89 of 4.4 GB for 16384 rows, on an H100).
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def linear_cross_entropy_ref(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    reduction: str = "sum",
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The specification: all logits at once, in float32 after the matmul."""
    return cross_entropy_ref(F.linear(x, head.to(x.dtype)), targets, softcap, reduction, z_loss, ignore_index)


def chunk_rows(V: int, D: int, device_type: str) -> int:
    """Rows of a chunk. On a CPU enough that summing the (V, D) parts of dW costs less than the passes over
    the logits; on a GPU a multiple of its tiles."""
    if device_type == "cuda":
        return max(CHUNK_BYTES["cuda"] // (2 * V) // 128, 1) * 128
    return max(CHUNK_BYTES["cpu"] // (4 * V), 2 * D)


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore: int, dlosses: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) of a chunk, and the gradient of its logits (n, V), which are overwritten.

    dlosses: (n,); None asks for no gradient.
    """
    if use_triton(logits):
        if dlosses is None:
            return cross_entropy_forward(logits, targets, softcap, z_loss, ignore, False)[0], None
        return cross_entropy_both(dlosses, logits, targets, softcap, z_loss, ignore), logits
    if use_c(logits):
        losses = torch.empty(len(logits), dtype=torch.float32)
        dlosses = None if dlosses is None else dlosses.contiguous()
        options = *logits.shape, float(softcap), float(z_loss), ignore
        run("cross_entropy", logits.dtype, logits, targets.contiguous(), dlosses, losses, *options)
        return losses, None if dlosses is None else logits
    dtype, logits = logits.dtype, logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = None
    if softcap:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if dlosses is not None else None
        logits = logits.mul_(softcap)
    carries = targets != ignore
    index = targets.where(carries, 0)[:, None]
    lse = logits.logsumexp(-1, keepdim=True)
    losses = ((lse - logits.gather(1, index) + z_loss * lse.square()).squeeze(1)) * carries
    if dlosses is None:
        return losses, None
    grad = logits.sub_(lse).exp_()  # the softmax
    if z_loss:
        grad.mul_(1 + 2 * z_loss * lse)
    grad.scatter_add_(1, index, torch.full_like(lse, -1.0))
    grad.mul_((carries * dlosses)[:, None])
    if slope is not None:
        grad.mul_(slope)
    return losses, grad.to(dtype)


def _grown(dw: Tensor | None, grad: Tensor, part: Tensor) -> Tensor:
    """dw (V, D) + grad^T part, in float32 or wider: dw itself, which is overwritten. None is zero."""
    if not grad.is_cuda or grad.dtype == torch.float32 or torch.version.hip is not None:
        share = grad.T @ part  # bfloat16 is rounded before the sum: no other matmul here
        return share.to(torch.promote_types(share.dtype, torch.float32)) if dw is None else dw.add_(share)
    if dw is None:
        return torch.mm(grad.T, part, out_dtype=torch.float32)
    return torch.addmm(dw, grad.T, part, out_dtype=torch.float32, out=dw)


def _chunks(x: Tensor, head: Tensor, targets: Tensor):
    """The head in the dtype of x; for each chunk its start, rows and targets."""
    rows = chunk_rows(*head.shape, x.device.type)
    return head.to(x.dtype), [(i, x[i : i + rows], targets[i : i + rows]) for i in range(0, len(x), rows)]


def _gradients(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float,
    z_loss: float,
    ignore: int,
    dlosses: Tensor,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and dx and dW, in the dtypes of x and head, for the gradients dlosses (N,).

    learns: whether the head does; dW of a frozen one has no rows.
    """
    weight, chunks = _chunks(x, head, targets)
    total, dw = torch.zeros((), dtype=torch.float32, device=x.device), None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start, part, target in chunks:
        here = slice(start, start + len(part))
        losses, grad = _losses_and_gradient(part @ weight.T, target, softcap, z_loss, ignore, dlosses[here])
        total = total + losses.sum()
        torch.mm(grad, weight, out=dx[here])
        if learns:
            dw = _grown(dw, grad, part)
        del grad  # so that only one chunk is in memory
    if dw is None:
        rows = len(head) if learns else 0
        dw = torch.zeros(rows, head.shape[1], dtype=head.dtype, device=x.device)
    return total, dx, dw.to(head.dtype)


def _sum(
    x: Tensor, head: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore: int, learns: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    ones = torch.ones(1, dtype=torch.float32, device=x.device).expand(len(x))
    return _gradients(x, head, targets, softcap, z_loss, ignore, ones, learns)


def _each(x: Tensor, head: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore: int) -> Tensor:
    weight, chunks = _chunks(x, head, targets)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for start, part, target in chunks:
        some, _ = _losses_and_gradient(product(part, weight), target, softcap, z_loss, ignore, None)
        losses[start : start + len(part)] = some
    return losses


def _each_backward(
    dlosses: Tensor,
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float,
    z_loss: float,
    ignore: int,
    learns: bool = True,
) -> tuple[Tensor, Tensor]:
    return _gradients(x, head, targets, softcap, z_loss, ignore, dlosses, learns)[1:]


def _empty(x: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    return torch.empty(x.shape if shape is None else shape, dtype=dtype or x.dtype, device=x.device)


def _empty_dw(head: Tensor, learns: bool = True) -> Tensor:
    return _empty(head, shape=(len(head) if learns else 0, head.shape[1]))


def _save_sum(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx, dtotal, *_):
    if dtotal is None:
        return (None,) * 7
    dx, dw = ctx.saved_tensors
    scaled = [torch.mul(x, dtotal.view(1, 1), out=_empty(x)) for x in (dx, dw)]  # in float32, rounded once
    return scaled[0], scaled[1] if ctx.needs_input_grad[1] else None, *(None,) * 5


def _save_each(ctx, inputs, output):
    x, head, targets, *ctx.options = inputs
    ctx.save_for_backward(x, head, targets)


def _again(ctx, dlosses):
    learns = ctx.needs_input_grad[1]
    dx, dw = _linear_losses_backward(dlosses, *ctx.saved_tensors, *ctx.options, learns)
    return dx, dw if learns else None, None, None, None, None


_linear_sum = kernel_op(
    "linear_cross_entropy_sum",
    _sum,
    lambda x, head, *rest: (_empty(x, torch.float32, ()), _empty(x), _empty_dw(head, *rest[4:])),
    _save_sum,
    _scale,
    opaque=True,
)
_linear_losses_backward = kernel_op(
    "linear_cross_entropy_backward",
    _each_backward,
    lambda dlosses, x, head, *rest: (_empty(x), _empty_dw(head, *rest[4:])),
    opaque=True,
)
_linear_losses = kernel_op(
    "linear_cross_entropy",
    _each,
    lambda x, *_: _empty(x, torch.float32, (x.shape[0],)),
    _save_each,
    _again,
    opaque=True,
)


def linear_cross_entropy(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    reduction: str = "sum",
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Loss of predicting targets from x through the head, in float32 and nats.

    x: (N, D), head: (V, D), targets: (N,) int64 with ignore_index for tokens without loss. softcap, z_loss:
    as in `cross_entropy`; 0 is none. reduction: "sum", "mean" over the tokens with loss (0 where none has
    one), or "none" for (N,), which without z_loss are negative log-probabilities of the tokens, as DPO and
    policy gradients need. The head is cast to the dtype of x, and x before that to `torch.autocast`'s.
    """
    (x,) = autocast(x)
    if x.dim() != 2 or head.dim() != 2 or x.shape[1] != head.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"x is {tuple(x.shape)}, head {tuple(head.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}; needed are (N, D), (V, D) and (N,)")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; it can be none, mean or sum")
    carries, options = targets != ignore_index, (softcap, z_loss, ignore_index)
    if reduction == "none" or not torch.is_grad_enabled():
        return reduce(_linear_losses(x, head, targets, *options), carries, reduction)
    total = _linear_sum(x, head, targets, *options, head.requires_grad)[0]
    return total / carries.sum().clamp(min=1) if reduction == "mean" else total

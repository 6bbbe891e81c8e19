"""Cross-entropy of the head's logits, with softcap: -log softmax(cap * tanh(x W^T / cap))[target].

The product and the loss are one operation, so that the logits, which at 32768 words take more memory than the
rest of the model's activations together, exist only a chunk of rows at a time. The gradients of a chunk are
computed while its logits are at hand; the backward pass only scales them.
"""
# N tokens, D width, V vocab

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # the target of a token that carries no loss
CHUNK_BYTES = 8 << 20  # of float32 logits: what stays in a cache


def softcap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 (Gemma 2); 0 only converts."""
    logits = logits.float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def linear_cross_entropy_ref(
    x: Tensor, head: Tensor, targets: Tensor, softcap: float = 0.0, reduction: str = "sum"
) -> Tensor:
    """The specification: all logits at once, in float32 after the product."""
    logits = softcap_logits(F.linear(x, head.to(x.dtype)), softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


class ChunkedSum(torch.autograd.Function):
    """The sum of the losses, and its gradients with it."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        N, V = len(x), len(head)
        weight = head.to(x.dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        rows = max(1, CHUNK_BYTES // (4 * V))
        for start in range(0, N, rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            logits = (part @ weight.T).float()  # (rows, V)
            if softcap:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()
                logits = logits.mul_(softcap)
            carries = target != IGNORE
            index = target.clamp(min=0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, index)).squeeze(1) * carries).sum()
            grad = logits.sub_(lse).exp_()  # the softmax, then the gradient of the logits
            grad.scatter_add_(1, index, torch.full_like(lse, -1.0))
            grad.mul_(carries[:, None])
            if softcap:
                grad.mul_(slope)
            grad = grad.to(x.dtype)
            torch.mm(grad, weight, out=dx[start : start + rows])
            dw += grad.T @ part
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad_output.to(dx.dtype), (dw * grad_output), None, None


def linear_cross_entropy(
    x: Tensor, head: Tensor, targets: Tensor, softcap: float = 0.0, reduction: str = "sum"
) -> Tensor:
    """Loss of predicting targets from x through the head.

    x: (N, D), head: (V, D), targets: (N,) int64 with -1 for tokens without loss. reduction: "sum", "mean"
    over the tokens with loss, or "none" for (N,). Returns float32, in nats.
    """
    if not torch.is_grad_enabled():
        rows = max(1, CHUNK_BYTES // (4 * len(head)))
        parts = zip(x.split(rows), targets.split(rows), strict=True)
        losses = torch.cat([linear_cross_entropy_ref(p, head, t, softcap, "none") for p, t in parts])
        if reduction == "none":
            return losses
        return losses.sum() / ((targets != IGNORE).sum() if reduction == "mean" else 1)
    if reduction == "none":
        return linear_cross_entropy_ref(x, head, targets, softcap, reduction)
    total = ChunkedSum.apply(x, head, targets, softcap)
    return total / (targets != IGNORE).sum() if reduction == "mean" else total

"""A mode in which a token's result does not depend, to the last bit, on what else is computed beside it.

Matmuls of different shapes add in different orders, and so do attention over a cache and attention over a
row. So an engine and a training pass give one token log-probabilities that differ in the last bits. In this
mode, both compute everything on the way to a log-probability by functions that add in one order and that know
of no other row: products, attention (attention_in_order.py), softcaps, sigmoids and the logarithm of the
softmax. The rest does so always. Then the log-probabilities are equal.

The kernels are in C, for CPUs; elsewhere the mode changes nothing, and `batch_invariant_works` says so.
Backward passes are as without the mode, by torch's matmuls.
"""
# R rows (tokens), D inner dimension, N outputs

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.cpu import decode_linear
from hotlap.kernels.cpu.library import MACROS, run
from hotlap.kernels.dispatch import autocast, constant, kernel_choice, kernel_op, use_c


class _Mode(threading.local):
    on = False


_mode = _Mode()


@contextlib.contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Compute in the batch-invariant mode in this thread, where `batch_invariant_works`; with on=False,
    without it. Compiled graphs keep the mode that they were traced in.
    """
    outer, _mode.on = _mode.on, on
    try:
        yield
    finally:
        _mode.on = outer


def batch_invariant_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the mode holds for models that compute in this dtype on this device. Weights in int8 are not
    covered.
    """
    return device.type == "cpu" and dtype in MACROS and kernel_choice("cpu") == "c"


@constant
def _on() -> bool:
    return _mode.on


def invariant(x: Tensor) -> bool:
    """Whether operations on x have to be batch-invariant, and can."""
    return _on() and use_c(x)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return decode_linear.forward(x, weight, *(None,) * 6, False, False)[0]


def _product_gradients(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    return dx, dy.T @ x if ctx.needs_input_grad[1] else None


def _softcap(x: Tensor, cap: float) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape)
    run("softcap", x.dtype, x, y, x.numel(), cap)
    return y


def _sigmoid(x: Tensor) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    run("sigmoid", x.dtype, x, y, x.numel())
    return y


def _save_softcap(ctx, inputs, output):
    ctx.cap = inputs[1]
    ctx.save_for_backward(output)


def _softcap_gradients(ctx, dy):
    return dy * (1 - (ctx.saved_tensors[0] / ctx.cap).square()), None


def _sigmoid_gradients(ctx, dy):
    (y,) = ctx.saved_tensors
    return dy * y * (1 - y)


_product_op = kernel_op(
    "product",
    _product,
    lambda x, weight: torch.empty(len(x), len(weight), dtype=x.dtype),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    _product_gradients,
    opaque=True,
)
_softcap_op = kernel_op(
    "softcap", _softcap, lambda x, cap: torch.empty(x.shape), _save_softcap, _softcap_gradients, opaque=True
)
_sigmoid_op = kernel_op(
    "sigmoid",
    _sigmoid,
    lambda x: torch.empty(x.shape, dtype=x.dtype),
    lambda ctx, inputs, output: ctx.save_for_backward(output),
    _sigmoid_gradients,
    opaque=True,
)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of x (..., D) and weight (N, D), of one dtype: (..., N)."""
    if not invariant(x):
        return F.linear(x, weight)
    x, weight = autocast(x, weight)
    return _product_op(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in float32 or wider."""
    return _softcap_op(x, float(cap)) if invariant(x) else cap * torch.tanh(x / cap)


def sigmoid(x: Tensor) -> Tensor:
    return _sigmoid_op(x) if invariant(x) else torch.sigmoid(x)


def log_softmax(logits: Tensor) -> Tensor:
    """Of rows of logits (M, V) in float32, without gradients. In the batch-invariant mode they are those of
    `linear_cross_entropy`, but for the sign.
    """
    if not invariant(logits):
        return logits.log_softmax(-1)
    y = logits.clone(memory_format=torch.contiguous_format)
    run("log_softmax", y.dtype, y, *y.shape)
    return y

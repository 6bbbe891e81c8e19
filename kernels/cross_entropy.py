"""Cross-entropy -log softmax(s)[target] of softcapped logits s = cap tanh(x / cap), with z-loss.

One pass reads the logits once and keeps a running maximum and sum (online softmax, Milakov and Gimelshein,
2018); the gradient is a second pass. If the losses' gradients are known in advance, as for a sum, one program
does both for a row, and the second read hits the cache. With z-loss z logsumexp(s)^2,

    dx = dloss (softmax(s) (1 + 2 z logsumexp(s)) - [target]) (1 - (s / cap)^2)

Bound by memory: N V e bytes forward and 2 N V e backward for elements of e bytes, 2 N V e for both at once;
about 4 N V FLOPs forward and 5 N V backward, with N V exponentials in each.
"""
# N tokens, V vocab

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hotlap.kernels.batch_invariant import softcap as bounded
from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, use_triton, wrap_triton
from hotlap.kernels.tanh import tanh
from hotlap.kernels.tiles import Case, Tile, as_rows, cdiv, pick_tile, type_name

IGNORE = -1  # default target of tokens without loss


def softcap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 or wider (Gemma 2); 0 only converts."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return bounded(logits, softcap) if softcap else logits


def cross_entropy_ref(
    logits: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The specification, in float32 or wider."""
    carries = targets != ignore_index
    logits = softcap_logits(logits.masked_fill(~carries.unsqueeze(-1), 0.0), softcap)
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, targets.where(carries, 0).unsqueeze(-1)).squeeze(-1)
    return reduce(torch.where(carries, lse - target + z_loss * lse.square(), 0.0), carries, reduction)


def reduce(losses: Tensor, carries: Tensor, reduction: str) -> Tensor:
    """The losses per token, their sum, or their mean over the tokens with loss."""
    if reduction == "none":
        return losses
    return losses.sum() / carries.sum().clamp(min=1) if reduction == "mean" else losses.sum()


@jit
def _tanh(x, CAPPED: tl.constexpr):
    """If CAPPED is 2, by the instruction of NVIDIA's GPUs: to 5e-4, in one step."""
    if CAPPED == 2:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tanh(x)


@jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)  # log2(e)


@jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    return softcap * _tanh(x / softcap, CAPPED) if CAPPED else x


@jit
def _normalizer(x, V, softcap, CAPPED: tl.constexpr, DEEP: tl.constexpr, LANES: tl.constexpr):
    """The highest logit of the row at x, and the logarithm of the sum of exp(logit - highest)."""
    # Each of LANES columns keeps its own maximum and sum over DEEP words at a time, so threads synchronise
    # only at the end of the row.
    word = tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, DEEP * LANES):
        real = start + word < V
        s = tl.load(x + start + word, real, other=float("-inf")).to(tl.float32)  # (DEEP, LANES)
        if CAPPED:
            s = tl.where(real, _capped(s, softcap, CAPPED), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        total = total * _exp(top - higher) + tl.sum(_exp(s - higher[None, :]), 0)
        top = higher
    highest = tl.max(top, 0)
    return highest, tl.log2(tl.sum(total * _exp(top - highest), 0)) * 0.6931471805599453  # ln(2)


@jit
def _target_logit(x, target, V, softcap, CAPPED: tl.constexpr):
    """NaN for a target outside the vocabulary, so that it cannot go unnoticed."""
    known = (target >= 0) & (target < V)
    return _capped(tl.load(x + target, known, other=float("nan")).to(tl.float32), softcap, CAPPED)


@jit
def _slope(x, norm, scale, is_target, softcap, z_loss, CAPPED: tl.constexpr):
    """The gradient of logits x in a row with this logsumexp; 0 where scale is 0, whatever the logits."""
    s = _capped(x, softcap, CAPPED)
    d = _exp(s - norm) * (1.0 + 2.0 * z_loss * norm) - tl.where(is_target, 1.0, 0.0)
    if CAPPED:
        t = s / softcap
        d *= 1.0 - t * t
    return tl.where(scale == 0.0, 0.0, d * scale)


@jit
def _cross_entropy_forward_kernel(
    logits, targets, losses, lse, stride, V, ignore, softcap, z_loss,
    CAPPED: tl.constexpr, DEEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31
    softcap, z_loss = tl.cast(softcap, tl.float32), tl.cast(z_loss, tl.float32)
    x, target = logits + row * stride, tl.load(targets + row)
    highest, log_total = _normalizer(x, V, softcap, CAPPED, DEEP, LANES)
    norm = highest + log_total
    tl.store(lse + row, norm)
    loss = (highest - _target_logit(x, target, V, softcap, CAPPED)) + log_total + z_loss * norm * norm
    tl.store(losses + row, tl.where(target != ignore, loss, 0.0))


@jit
def _cross_entropy_backward_kernel(
    dloss, logits, targets, lse, dlogits, stride_dloss, stride, stride_out, V, ignore, softcap, z_loss,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One block of one row. dlogits may be logits: each is written where it was read.
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    word = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    softcap, z_loss = tl.cast(softcap, tl.float32), tl.cast(z_loss, tl.float32)
    target = tl.load(targets + row)
    scale = tl.where(target != ignore, tl.load(dloss + row * stride_dloss).to(tl.float32), 0.0)
    x = tl.load(logits + row * stride + word, word < V, other=0.0).to(tl.float32)
    d = _slope(x, tl.load(lse + row), scale, word == target, softcap, z_loss, CAPPED)
    tl.store(dlogits + row * stride_out + word, d.to(dlogits.dtype.element_ty), word < V)


@jit
def _cross_entropy_both_kernel(
    dloss, logits, targets, losses, stride_dloss, stride, V, ignore, softcap, z_loss,
    CAPPED: tl.constexpr, DEEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The loss of one row, whose logits become their gradient."""
    row = tl.program_id(0).to(tl.int64)
    softcap, z_loss = tl.cast(softcap, tl.float32), tl.cast(z_loss, tl.float32)
    x, target = logits + row * stride, tl.load(targets + row)
    scale = tl.where(target != ignore, tl.load(dloss + row * stride_dloss).to(tl.float32), 0.0)
    s = _target_logit(x, target, V, softcap, CAPPED)  # before any thread overwrites it
    highest, log_total = _normalizer(x, V, softcap, CAPPED, DEEP, LANES)  # all threads synchronise here
    norm = highest + log_total
    tl.store(losses + row, tl.where(target != ignore, (highest - s) + log_total + z_loss * norm * norm, 0.0))
    lane = tl.arange(0, LANES)
    for start in range(0, V, LANES):
        word = start + lane
        v = tl.load(x + word, word < V, other=0.0).to(tl.float32)
        d = _slope(v, norm, scale, word == target, softcap, z_loss, CAPPED)
        tl.store(x + word, d.to(logits.dtype.element_ty), word < V)


def _cross_entropy_forward_tiles(_: int, device: Device) -> list[Tile]:
    """Wide enough that no two threads share a column: 8 columns per thread, or a multiple."""
    sizes = ((4, 1024, 4), (4, 2048, 8), (2, 2048, 8), (8, 1024, 4), (4, 4096, 16))
    return [Tile({"DEEP": deep, "LANES": lanes * device.warp // 32}, warps) for deep, lanes, warps in sizes]


def _cross_entropy_backward_tiles(_: int, __: Device) -> list[Tile]:
    return [Tile({"BLOCK": block}, warps) for block, warps in ((2048, 4), (4096, 8), (4096, 4), (1024, 2))]


def _cross_entropy_both_tiles(_: int, device: Device) -> list[Tile]:
    """Enough threads per row that the rows in flight fit the cache: with 32768 words two or three rows per
    processor, 17 to 26 MB on an H100.
    """
    sizes = ((1, 4096, 16), (2, 4096, 16), (1, 8192, 32), (1, 2048, 8))
    return [Tile({"DEEP": deep, "LANES": lanes}, warps * 32 // device.warp) for deep, lanes, warps in sizes]


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and the logarithms of the softmax's denominators (N,), both float32."""
    N, V = logits.shape
    losses, lse = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    if N:
        logits, targets = as_rows(logits), targets.contiguous()
        tile = pick_tile(_cross_entropy_forward_tiles, 0, device_facts(logits.device))
        with torch.cuda.device_of(logits):
            wrap_triton(_cross_entropy_forward_kernel)[(N,)](
                logits, targets, losses, lse, logits.stride(0), V, ignore, softcap, z_loss,
                CAPPED=1 if softcap else 0, **tile.arguments,
            )  # fmt: skip
    return losses, lse


def cross_entropy_both(
    dloss: Tensor, logits: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore: int
) -> Tensor:
    """Losses (N,) in float32. The logits (N, V), row-major, are overwritten by their gradient.

    NVIDIA's GPUs take the softcap of bfloat16 logits by their own tanh. It is off by at most 5e-4 of a logit,
    a quarter of what bfloat16 rounds, so losses may differ by that from those of `cross_entropy_forward`.
    """
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N:
        targets, device = targets.contiguous(), device_facts(logits.device)
        tile = pick_tile(_cross_entropy_both_tiles, 0, device)
        # bfloat16 has rounded the logits by four times as much as the fast tanh is off
        fast = logits.dtype == torch.bfloat16 and device.compute >= 75
        with torch.cuda.device_of(logits):
            wrap_triton(_cross_entropy_both_kernel)[(N,)](
                dloss, logits, targets, losses, dloss.stride(0), logits.stride(0), V, ignore, softcap, z_loss,
                CAPPED=(2 if fast else 1) if softcap else 0, **tile.arguments,
            )  # fmt: skip
    return losses


def _backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, softcap: float, z_loss: float, ignore: int
) -> Tensor:
    return _write_gradient(dloss, logits, targets, lse, softcap, z_loss, ignore, _empty(logits))


def _backward_in_place(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, softcap: float, z_loss: float, ignore: int
) -> None:
    _write_gradient(dloss, logits, targets, lse, softcap, z_loss, ignore, logits)


def _write_gradient(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, softcap: float, z_loss: float, ignore: int,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, written to out, which may be the logits."""
    N, V = logits.shape
    if N:
        logits, targets = as_rows(logits), targets.contiguous()
        tile = pick_tile(_cross_entropy_backward_tiles, 0, device_facts(logits.device))
        grid = (N * cdiv(V, tile.blocks["BLOCK"]),)
        with torch.cuda.device_of(logits):
            wrap_triton(_cross_entropy_backward_kernel)[grid](
                dloss, logits, targets, lse, out, dloss.stride(0), logits.stride(0), out.stride(0),
                V, ignore, softcap, z_loss, CAPPED=1 if softcap else 0, **tile.arguments,
            )  # fmt: skip
    return out


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx, inputs, output):
    logits, targets, *ctx.options, ctx.in_place = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dloss, _):
    logits, targets, lse = ctx.saved_tensors
    if ctx.in_place and logits.stride(1) == 1:
        dlogits = logits.detach()
        _cross_entropy_backward_in_place(dloss, dlogits, targets, lse, *ctx.options)
    else:
        dlogits = _cross_entropy_backward(dloss, logits, targets, lse, *ctx.options)
    return dlogits, None, None, None, None, None


_cross_entropy_backward = kernel_op(
    "cross_entropy_backward", _backward, lambda dloss, logits, *_: _empty(logits)
)
_cross_entropy_backward_in_place = kernel_op(
    "cross_entropy_backward_in_place", _backward_in_place, lambda *_: None, mutates=("logits",)
)
_cross_entropy = kernel_op(
    "cross_entropy",
    cross_entropy_forward,
    lambda logits, *_: tuple(
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(2)
    ),
    _save,
    _gradient,
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    inplace_backward: bool = False,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Loss of predicting targets (N,) int64, ignore_index for tokens without loss, by logits (N, V).

    softcap: the logits are first bounded by softcap * tanh(logits / softcap); 0 is none. z_loss: weight of
    logsumexp^2 (PaLM, Chowdhery et al., 2022). reduction: "sum", "mean" over the tokens with loss (0 where
    none has one), or "none" for (N,). inplace_backward: the backward pass may overwrite the logits by their
    gradient. It does so in eager Triton; compilers plan memory themselves. Returns float32, in nats.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"logits are {tuple(logits.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}; they have to be (N, V) and (N,)")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; it can be none, mean or sum")
    if not use_triton(logits):
        return cross_entropy_ref(logits, targets, softcap, reduction, z_loss, ignore_index)
    in_place = inplace_backward and not torch.compiler.is_compiling()
    losses, _ = _cross_entropy(logits, targets, softcap, z_loss, ignore_index, in_place)
    return reduce(losses, targets != ignore_index, reduction)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: logits of 50304 words, with and without softcap."""
    t, N, V = f"*{type_name(dtype)}", 8192, 50304

    def data(device):
        return torch.randn(N, V, device=device, dtype=dtype), torch.randint(V, (N,), device=device)

    def of(softcap: float) -> list[Case]:
        scalars = {"V": "i32", "ignore": "i32", "softcap": "fp64", "z_loss": "fp64"}
        scalars |= {"CAPPED": 1 if softcap else 0}
        forward = {"logits": t, "targets": "*i64", "losses": "*fp32", "lse": "*fp32", "stride": "i32"}
        backward = {"dloss": "*fp32", "logits": t, "targets": "*i64", "lse": "*fp32", "dlogits": t}
        backward |= dict.fromkeys(("stride_dloss", "stride", "stride_out"), "i32")
        both = {"dloss": "*fp32", "logits": t, "targets": "*i64", "losses": "*fp32"}
        both |= dict.fromkeys(("stride_dloss", "stride"), "i32")

        def run_forward(device):
            logits, targets = data(device)
            return lambda: cross_entropy_forward(logits, targets, softcap, 0.0, IGNORE, False)

        def run_backward(device):
            logits, targets = data(device)
            losses, lse = cross_entropy_forward(logits, targets, softcap, 0.0, IGNORE, False)
            return lambda: _backward(losses, logits, targets, lse, softcap, 0.0, IGNORE)

        def run_both(device):
            logits, targets = data(device)
            ones = torch.ones(N, device=device)
            return lambda: cross_entropy_both(ones, logits, targets, softcap, 0.0, IGNORE)

        variant = "softcap" if softcap else ""
        found = []
        for arguments, table, run in (
            (forward, _cross_entropy_forward_tiles, run_forward),
            (backward, _cross_entropy_backward_tiles, run_backward),
            (both, _cross_entropy_both_tiles, run_both),
        ):
            kernel = f"{table.__name__.removesuffix('_tiles')}_kernel"
            found.append(Case(kernel, arguments | scalars, table, 0, run, variant))
        if softcap and dtype == torch.bfloat16:
            fast = both | scalars | {"CAPPED": 2}
            found.append(replace(found[-1], arguments=fast, variant="fast softcap", without=("gfx942",)))
        return found

    return [*of(0.0), *of(15.0)]

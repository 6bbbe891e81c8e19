"""Causal self-attention with sliding windows, grouped heads and packed documents.

The queries are the last T of S positions: query t is at position p = S - T + t. It sees the keys s with
p - window < s <= p, so a window counts the query's own key (flash-attn's window of (window - 1, 0)), and with
s >= document_start[t], so documents packed into one row do not see each other. A query that sees no key gives
zeros.

4 C FLOPs forward and 10 C backward for each visible pair of query and key; our kernels do 14 C backward
(attention_backward.py explains why). Nothing of size T x S is ever stored.
"""
# B batch, T queries, S keys, H heads, K kv heads, C head dim

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hotlap.common.log import log
from hotlap.kernels.attention_backward import (
    _attention_dk_dv_tiles,
    _attention_dq_tiles,
    attention_backward,
)
from hotlap.kernels.attention_blockwise import attention_blockwise, masked_softmax, without_blind
from hotlap.kernels.attention_forward import _attention_forward_tiles, attention_forward, tile_for
from hotlap.kernels.attention_hopper import HEAD
from hotlap.kernels.attention_in_order import attention_in_order
from hotlap.kernels.attention_torch import (
    SDPA,
    attention_flash_attn,
    attention_sdpa,
    flash_attn_function,
    sdpa_takes,
)
from hotlap.kernels.batch_invariant import invariant
from hotlap.kernels.cpu.measured import fastest
from hotlap.kernels.dispatch import autocast, constant, device_facts, kernel_choice, kernel_op, use_triton
from hotlap.kernels.tiles import next_power_of_2, tuned


def visible_keys(T: int, S: int, window: int | None, document_start: Tensor | None, device) -> Tensor:
    """Boolean (T, S), or (B, 1, T, S) with documents: whether query row may see key column."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    mask = (distance >= 0) & (distance < (window or S))
    if document_start is not None:
        mask = mask & (torch.arange(S, device=device) >= document_start[:, None, :, None])
    return mask


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_start: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """The specification: the whole T x S matrix, softmax in float32 or wider."""
    groups, T, S = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # (B, H, T, C)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = masked_softmax(scores, visible_keys(T, S, window, document_start, q.device), softcap or 0)
    return without_blind((weights @ v).transpose(1, 2), S, document_start)


def _unit(x: Tensor) -> Tensor:
    """x with unit stride over C, and token strides that a kernel can multiply in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 23 else x.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
    special: bool,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        y, lse = _fake(q, k, v)
        return y.zero_(), lse
    return attention_forward(_unit(q), _unit(k), _unit(v), document_start, window, softcap, scale, special)


def _backward(
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
    special: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dy, q, k, v = _unit(dy), _unit(q), _unit(k), _unit(v)
    return attention_backward(dy, q, k, v, document_start, y, lse, window, softcap, scale, special)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(q, *_):
    B, T, H, _ = q.shape
    return _empty(q), torch.empty(B, H, T, dtype=torch.float32, device=q.device)


def _save(ctx, inputs, output):
    q, k, v, document_start, ctx.window, ctx.softcap, ctx.scale, ctx.special = inputs
    ctx.save_for_backward(q, k, v, document_start, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    backward = _attention_backward_special if ctx.special else _attention_backward
    numbers = (ctx.window, ctx.softcap, ctx.scale, ctx.special)
    return *backward(dy, *ctx.saved_tensors, *numbers), *(None,) * 5


def _fake_gradients(dy, q, k, v, *_):
    return _empty(q), _empty(k), _empty(v)


_attention_backward = kernel_op("attention_backward", _backward, _fake_gradients)
_attention = kernel_op("attention", _forward, _fake, _save, _gradients)
# the same with kernels that torch cannot trace: their descriptors are not tensors, and they are not Triton's
_attention_backward_special = kernel_op("attention_backward_special", _backward, _fake_gradients, opaque=True)
_attention_special = kernel_op("attention_special", _forward, _fake, _save, _gradients, opaque=True)

BACKENDS = ("triton", "sdpa", "flash", "cudnn", "flash-attn", "blockwise")


def case_key(C: int, S: int, window: int) -> str:
    """The name of a measured case: the head size, and the length and window rounded up to a power of two."""
    return f"{C} {next_power_of_2(S)} {next_power_of_2(window)}"


def can_run(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    C: int,
    S: int,
    grouped: bool,
    plain: bool,
    documents: bool,
) -> bool:
    """Whether a backend can run this case on this GPU. plain: only causal."""
    if backend in SDPA:
        return plain and sdpa_takes(backend, device, dtype, C, S, grouped)
    if backend == "flash-attn":
        return not documents and dtype != torch.float32 and flash_attn_function(device) is not None
    if backend == "triton":
        return dtype != torch.float32  # which has no tensor cores
    return plain or backend != "sdpa"


@functools.cache
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    C: int,
    S: int,
    grouped: bool,
    plain: bool,
    documents: bool,
    kernels: bool,
    window: int,
    softcap: bool,
    deterministic: bool,
) -> str:
    """The backend for "auto". grouped: heads share keys. plain: only causal. kernels: Triton runs here.
    deterministic: torch's setting, which rules out cuDNN.

    On a GPU: what `hotlap bench tune` measured, or else torch's fused kernels if the mask is only causal.
    From Hopper on that is cuDNN, which on an H100 took 2.69 ms forward and backward against our 3.14, for two
    rows of 8192 with 12 heads of 128. Windows, documents and softcaps in 16 bits use ours. On a CPU: blocks,
    unless the mask is only causal and torch's kernel is measured to be faster.
    """
    why = "only causal" if plain else "more than causal"
    if device.type != "cuda":
        choice = "triton" if kernels else "blockwise"
        if plain and device.type == "cpu" and not kernels:
            choice, why = _faster_on_cpu(dtype, C, S), "only causal, measured"
    else:
        measured = None
        if kernels and not (documents or softcap):
            measured = tuned(device_facts(device)).choices.get(case_key(C, S, window))
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
        ranking = (measured, hopper and "cudnn", "flash", kernels and "triton", "sdpa", "blockwise")
        case = (device, dtype, C, S, grouped, plain, documents)
        choice = next(name for name in ranking if name and can_run(name, *case))
        why = "measured" if choice == measured else why
    _report(choice, why)
    return choice


def _faster_on_cpu(dtype: torch.dtype, C: int, S: int) -> str:
    """The faster backend for training on plain causal rows of S tokens, measured for 2048 tokens."""
    S = min(S, 2048)  # from there on, both grow with the square of S

    def prepare(backend: str) -> Callable[[], None]:
        q = torch.ones(1, S, 2048 // S, C, dtype=dtype, requires_grad=True)
        return lambda: attention(q, q, q, backend=backend).sum().backward()

    kernels, name = kernel_choice("cpu"), str(dtype).removeprefix("torch.")
    question = f"attention by {kernels} for {name} heads of {C} and {S} keys"
    return fastest(question, {name: functools.partial(prepare, name) for name in ("blockwise", "sdpa")})


@functools.cache
def _report(choice: str, why: str) -> None:
    log.info("attention: %s (%s)", choice, why)


@constant
def choose_backend(*question) -> str:
    """The backend for "auto": `_choose`, cached."""
    return _choose(*question)


@constant
def backend_runs(*question) -> bool:
    """As `can_run`."""
    return can_run(*question)


@constant
def is_special(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a tile for heads of HEAD belongs to a form of its kernel that torch cannot trace."""
    tables = (_attention_forward_tiles, _attention_dq_tiles, _attention_dk_dv_tiles)
    return any(tile_for(table, device, dtype, HEAD, special=True).kernel for table in tables)


def check_arguments(q, k, v, window, document_start, softcap, scale, backend) -> None:
    """ValueError for arguments that `attention` does not accept."""
    B, T, H, C = q.shape
    K = k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != C or H % K:
        shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"{shapes}; needed are (B, T, H, C) and twice (B, S, K, C) with H a multiple of K")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; all have to be of one dtype")
    if document_start is not None and document_start.shape != (B, T):
        raise ValueError(f"document_start is {tuple(document_start.shape)}; the queries need {(B, T)}")
    if (window is not None and window < 1) or (softcap or 0) < 0 or (scale is not None and scale <= 0):
        raise ValueError(f"window={window}, softcap={softcap} and scale={scale} have to be positive, or None")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    if backend == "triton" and not use_triton(q):
        raise ValueError(
            "backend 'triton' needs float32, bfloat16 or float16, a GPU, and Triton kernels switched on; "
            "try backend='auto'"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    document_start: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of the last T of S positions.

    q: (B, T, H, C); k, v: (B, S, K, C) with H a multiple of K; any strides. window: keys that a query sees,
    including its own; None is all. document_start: (B, T) integers that do not decrease along T, the position
    at which each query's document starts; None is one document a row. softcap: scores s become
    softcap tanh(s / softcap). scale: of the scores; None is C^-1/2. backend: "auto" or one of BACKENDS.
    Returns (B, T, H, C) in q's dtype, or in that of `torch.autocast`, to which it casts q, k and v.
    """
    q, k, v = autocast(q, k, v)
    check_arguments(q, k, v, window, document_start, softcap, scale, backend)
    T, H, C = q.shape[1:]
    S, K = k.shape[1:3]
    window = window if window is not None and window < S else 0
    softcap, scale = softcap or 0.0, C**-0.5 if scale is None else scale
    documents = document_start is not None
    if backend == "auto" and T == S and invariant(q):
        return attention_in_order(q, k, v, None, None, document_start, window, softcap, scale)
    plain = not documents and not window and not softcap and T == S
    case = (q.device, q.dtype, C, next_power_of_2(S), H != K, plain, documents)
    if backend == "auto":
        deterministic = torch.are_deterministic_algorithms_enabled()
        backend = choose_backend(*case, use_triton(q), next_power_of_2(window), softcap > 0, deterministic)
    elif backend in SDPA and plain and not backend_runs(backend, *case):
        raise ValueError(
            f"torch has no {backend!r} attention for {str(q.dtype).removeprefix('torch.')} heads of {C} on "
            f"{q.device.type!r} here; try backend='sdpa', or 'auto'"
        )
    if backend == "triton":
        if documents:
            document_start = document_start.to(torch.int32).contiguous()
        special = C == HEAD and not softcap and is_special(q.device, q.dtype)
        operation = _attention_special if special else _attention
        return operation(q, k, v, document_start, window, softcap, scale, special)[0]
    if backend == "blockwise":
        return attention_blockwise(q, k, v, document_start, window, softcap, scale)
    if backend == "flash-attn" and not documents:
        return attention_flash_attn(q, k, v, window, softcap, scale)
    if not plain:
        lacks = "" if backend == "flash-attn" else "windows, softcaps, fewer queries than keys, or "
        raise ValueError(f"backend {backend!r} has no {lacks}documents; try backend='auto'")
    return attention_sdpa(q, k, v, scale, backend)

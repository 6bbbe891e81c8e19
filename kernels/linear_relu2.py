"""The MLP relu(x W_in^T)^2 W_out^T, with the activation in the epilogue of the first matmul.

With p = x W_in^T and a = relu(p)^2, the forward pass writes only a, whose root is relu(p). Backward:

    da = dy W_out    dp = 2 sqrt(a) da    dx = dp W_in    dW_in = dp^T x    dW_out = dy^T a

where dp is computed in the epilogue of the matmul da. The root of an a rounded to bfloat16 is off by at most
2^-9. All other matmuls use cuBLAS. Saves 2 M N e bytes forward and 3 M N e backward against matmuls and an
elementwise pass, with 2 M N D FLOPs in each kernel, so it pays off while D is small.

float16 is not fused, because the root of a would not be relu(p): below 2^-14 float16 loses bits of a, and
below 2^-25 all of them. `relu2` keeps p.

The fused matmul has three forms. The plain one uses pointers, and each program computes one tile. The form
for devices with a TMA is persistent: one program per processor, which takes tile after tile and addresses
them by tensor descriptors. The third is torch's matmul and an elementwise pass in place: 2 M N e more bytes
forward and 3 M N e backward, with a matmul that may be faster than ours. `hotlap bench tune` measures which
is best.
"""
# M tokens, D width, N hidden width; K inner dimension of a matmul

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.kernels.cpu import linear_relu2 as cpu
from hotlap.kernels.dispatch import (
    INTERPRETED,
    Device,
    allow_descriptors,
    autocast,
    device_facts,
    jit,
    kernel_op,
    tl,
    use_c,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.tiles import Case, Tile, cdiv, fitting_tiles, pick_tile, type_name

# Up to this width the epilogue saves more (4 N bytes a token at 3 TB/s) than Triton's matmul loses to cuBLAS
# (2 N D FLOPs at 600 instead of 750 TFLOP/s), as calculated for an H100. Measured on one at a width of 1536,
# where the TMA form ran at 697 TFLOP/s; wider was not measured.
FUSED_WIDTH = 2048
# Fewer rows than this are bound by reading the weights. One row of 128 x 256 tiles is N / 256 programs (24 at
# d24's width), too few to read at full bandwidth; cuBLAS has smaller tiles, and splits K among programs.
FEWEST_ROWS = 64
RESERVE = 2 << 10  # bytes of shared memory for barriers and the like


def linear_relu2_ref(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The specification. x: (..., D), w_in: (N, D), w_out: (D, N)."""
    return F.linear(relu2(F.linear(x, w_in.to(x.dtype))), w_out.to(x.dtype))


@jit
def _place(tile, down, across, GROUP: tl.constexpr):
    """Row and column of a tile. Tiles computed together share rows of x and columns of w in the L2 cache."""
    first = tile // (GROUP * across) * GROUP
    rows = tl.minimum(down - first, GROUP)
    rest = tile % (GROUP * across)
    return first + rest % rows, rest // rows


@jit
def _activation(p):
    p = tl.where(p < 0, 0.0, p)  # unlike a maximum, keeps NaN
    return p * p


@jit
def _gradient(da, a):
    return da * (2.0 * tl.sqrt(a.to(tl.float32)))


@jit
def _linear_relu2_kernel(
    x, w, a, out, x_m, w_k, w_n, M, N, K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (M, N) = relu(x w)^2, or if BACKWARD 2 sqrt(a) x w. x (M, K), w (K, N); a and out contiguous."""
    row, column = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = (row * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    n = (column * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    left = x + tl.minimum(m, M - 1) * x_m + k[None, :]  # (BLOCK_M, BLOCK_K)
    right = w + k[:, None].to(tl.int64) * w_k + n * w_n  # (BLOCK_K, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        p = tl.load(left, inside[None, :], other=0.0)
        q = tl.load(right, inside[:, None] & (n < N), other=0.0)
        total = tl.dot(p, q, total, input_precision="ieee")
        left += BLOCK_K
        right += tl.cast(w_k, tl.int64) * BLOCK_K
    mask = (m < M) & (n < N)
    place = m * N + n
    total = _gradient(total, tl.load(a + place, mask, other=0.0)) if BACKWARD else _activation(total)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


@jit
def _linear_relu2_tma_kernel(
    x, w, a, out, x_m, w_k, w_n, M, N, K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same, for tensors that `_tma_takes`. Columns of w are contiguous, or its rows if BACKWARD.

    Descriptors read zeros beyond a matrix, and write nothing there.
    """
    HALF: tl.constexpr = BLOCK_N // 2  # half a tile is written at a time, to fit beside the operands
    lefts = tl.make_tensor_descriptor(x, [M, K], [x_m, 1], [BLOCK_M, BLOCK_K])
    if BACKWARD:
        rights = tl.make_tensor_descriptor(w, [K, N], [w_k, 1], [BLOCK_K, BLOCK_N])
        saved = tl.make_tensor_descriptor(a, [M, N], [N, 1], [BLOCK_M, HALF])
    else:
        rights = tl.make_tensor_descriptor(w, [N, K], [w_n, 1], [BLOCK_N, BLOCK_K])
    results = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, HALF])
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # one loop over tiles and K, so that the next tile's operands load while this one is written
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        row, column = _place(tile, down, across, GROUP)
        m, n = row * BLOCK_M, column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            p = lefts.load([m, k])
            q = rights.load([k, n]) if BACKWARD else rights.load([n, k]).T
            total = tl.dot(p, q, total, input_precision="ieee")
        first, second = tl.split(total.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))  # (BLOCK_M, HALF) each
        first = _gradient(first, saved.load([m, n])) if BACKWARD else _activation(first)
        results.store([m, n], first.to(out.dtype.element_ty))
        second = _gradient(second, saved.load([m, n + HALF])) if BACKWARD else _activation(second)
        results.store([m, n + HALF], second.to(out.dtype.element_ty))


@jit
def _linear_relu2_apart_kernel(a, out, M, N, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """In place, out = relu(out)^2, or if BACKWARD 2 sqrt(a) out. (M, N), contiguous."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.cast(M, tl.int64) * N
    p = tl.load(out + place, mask, other=0.0).to(tl.float32)
    p = _gradient(p, tl.load(a + place, mask, other=0.0)) if BACKWARD else _activation(p)
    tl.store(out + place, p.to(out.dtype.element_ty), mask)


def _linear_relu2_tiles(backward: int, device: Device) -> list[Tile]:
    """M, N, K of a block. Each stage holds two operands in shared memory; backward reads a as well.

    Tiles of the other forms come last, because they have to be measured. On Hopper they were, and the TMA
    form comes first (on an H100 it took 0.62 of the plain form's time forward, and 0.80 backward). That form
    also keeps half a block of the result in shared memory, and backward both halves of a.
    """
    shapes = [(128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (128, 128, 64, 8, 3), (64, 128, 32, 4, 4)]
    if device.shared_memory >= 200 << 10:  # datacenter Hopper and Blackwell
        shapes = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4)]
        shapes[:2] = reversed(shapes[:2]) if backward else shapes[:2]
    elif device.warp == 64:  # AMD
        shapes = [(128, 128, 32, 8, 2), (64, 64, 64, 4, 2)]
    plain, tma = [], []
    for m, n, k, warps, stages in shapes:
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
        plain.append(Tile(blocks, warps, stages, shared=2 * stages * k * (m + n) + RESERVE))
    shapes = [(128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3)]
    if device.shared_memory >= 200 << 10:
        shapes = [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4)]
    for m, n, k, warps, stages in shapes if device.tma else ():
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
        shared = 2 * stages * k * (m + n) + (1 + backward) * m * n + RESERVE
        tma.append(Tile(blocks, warps, stages, shared=shared, kernel="_linear_relu2_tma_kernel"))
    first, second = (tma, plain) if device.compute == 90 else (plain, tma)
    return [*first, *second, Tile({"BLOCK": 2048}, warps=4, kernel="_linear_relu2_apart_kernel")]


def _tma_takes(*matrices: Tensor) -> bool:
    """Whether rows are contiguous, do not overlap, are not empty, and start at multiples of 16 bytes.

    torch aligns storages; a tensor that a compiler traces has no other address to check.
    """
    return all(
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1] > 0
        and x.stride(0) * x.itemsize % 16 == 0
        and x.storage_offset() * x.itemsize % 16 == 0
        for x in matrices
    )


def _product(x: Tensor, w: Tensor, a: Tensor | None) -> Tensor:
    """Launch a kernel: x (M, K) with unit stride, w (K, N) with any."""
    (M, K), N = x.shape, w.shape[1]
    backward, device = a is not None, device_facts(x.device)
    tile = pick_tile(_linear_relu2_tiles, int(backward), device)
    if M and tile.kernel == "_linear_relu2_apart_kernel":
        return _in_two_passes(x, w, a, tile)
    out = _empty(x, M, N)
    if M:
        if tile.kernel and not _tma_takes(x, w if backward else w.T, a if backward else out):
            fitting = fitting_tiles(_linear_relu2_tiles, int(backward), device)
            tile = next(plain for plain in fitting if not plain.kernel)
        kernel = _linear_relu2_tma_kernel if tile.kernel else _linear_relu2_kernel
        programs = cdiv(M, tile.blocks["BLOCK_M"]) * cdiv(N, tile.blocks["BLOCK_N"])
        if tile.kernel:
            programs = min(programs, device.processors)
            allow_descriptors()
        with torch.cuda.device_of(x):
            wrap_triton(kernel)[(programs,)](
                x, w, a, out, x.stride(0), *w.stride(), M, N, K, BACKWARD=backward, **tile.arguments
            )
    return out


def _in_two_passes(x: Tensor, w: Tensor, a: Tensor | None, tile: Tile) -> Tensor:
    out = _near(x) @ w
    grid = (cdiv(out.numel(), tile.blocks["BLOCK"]),)
    with torch.cuda.device_of(x):
        wrap_triton(_linear_relu2_apart_kernel)[grid](
            a, out, *out.shape, BACKWARD=a is not None, **tile.arguments
        )
    return out


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape or x.shape, dtype=x.dtype, device=x.device)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _near(x: Tensor) -> Tensor:
    """x, or a copy if its row stride is too large for cuBLAS."""
    return x if max(x.stride()) < 1 << 31 else x.contiguous()


def _forward(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """y (M, D) and a (M, N)."""
    a = _product(_unit(x), w_in.T, None)
    return a @ w_out.T, a


def _backward(dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dp = _product(_unit(dy), w_out, a)
    return dp @ w_in, dp.T @ _near(x), _near(dy).T @ a


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    return (None,) * 3 if dy is None else _linear_relu2_backward(dy, *ctx.saved_tensors)


_linear_relu2_backward = kernel_op(
    "linear_relu2_backward",
    _backward,
    lambda dy, x, w_in, w_out, a: tuple(map(_empty, (x, w_in, w_out))),
    c=cpu.backward,
)
_linear_relu2 = kernel_op(
    "linear_relu2",
    _forward,
    lambda x, w_in, w_out: (_empty(x, x.shape[0], w_out.shape[0]), _empty(x, x.shape[0], w_in.shape[0])),
    _save,
    _gradients,
    c=cpu.forward,
)


def linear_relu2(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """relu(x w_in^T)^2 w_out^T of x (..., D), w_in (N, D) and w_out (D, N), in the dtype of x: (..., D).

    The weights are cast to it, and x before that to the dtype of `torch.autocast`. float16, float32 on a GPU
    (no tensor cores), widths above FUSED_WIDTH, and fewer than FEWEST_ROWS rows without gradients (decoding)
    use plain matmuls and an elementwise kernel.
    """
    (x,) = autocast(x)
    D = x.shape[-1]
    if w_in.dim() != 2 or w_in.shape[1] != D or w_out.dim() != 2 or w_out.shape[1] != w_in.shape[0]:
        shapes = f"x is {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)}"
        raise ValueError(f"{shapes}; needed are (..., D), (N, D) and (D, N)")
    fused = D <= FUSED_WIDTH and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and INTERPRETED))
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_in, w_out))
    fused = fused and (trained or x.numel() >= FEWEST_ROWS * D)
    if not (use_c(x) or (use_triton(x) and fused)):
        return linear_relu2_ref(x, w_in, w_out)
    y, _ = _linear_relu2(x.reshape(-1, D), w_in.to(x.dtype), w_out.to(x.dtype))
    return y.view(*x.shape[:-1], w_out.shape[0])


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: 16k tokens of d24, in the only dtype that GPUs fuse."""
    if dtype != torch.bfloat16:
        return []
    t, (M, D, N) = f"*{type_name(dtype)}", (16384, 1536, 6144)
    common = {"x": t, "w": t, "out": t, "x_m": "i32", "M": "i32", "N": "i32", "K": "i32"}

    def run(backward: bool, device: torch.device):
        x, w = (torch.randn(n, D, device=device, dtype=dtype) for n in (M, N))
        w = w / D**0.5
        if backward:
            w, a = w.T.contiguous(), torch.rand(M, N, device=device, dtype=dtype)
            return lambda: _product(x, w, a)
        return lambda: _product(x, w.T, None)

    forward = {**common, "a": None, "w_k": 1, "w_n": "i32", "BACKWARD": False}
    backward = {**common, "a": t, "w_k": "i32", "w_n": 1, "BACKWARD": True}
    table, kernel = _linear_relu2_tiles, "_linear_relu2_kernel"
    return [
        Case(kernel, forward, table, 0, functools.partial(run, False), "forward"),
        Case(kernel, backward, table, 1, functools.partial(run, True), "backward"),
    ]

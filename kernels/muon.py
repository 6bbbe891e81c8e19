"""The elementwise halves of a Muon step, before and after the orthogonalisation (Jordan et al., 2024).

Before: momentum, Nesterov, and rows scaled to a common norm (MuonEq). The norm is 1 here, because the
orthogonalisation ignores a factor of the whole matrix. So rows are independent: each is read once and written
in the 16 bits that the matmuls take. The norm of the matrix is then known: M^0.5, less for rows of zeros.

After: NorMuon's second moment (Li et al., 2025) with the update's norm kept, cautious weight decay (only
where update and weight agree in sign; Liang et al., 2024), and the step itself. The norms of the update
before and after the second moment both follow from the sums of squares along the short side. So one pass
reads the update for those sums, one program per matrix turns them into a factor per row (per column of a wide
matrix), and one pass moves the weight. No atomics. Only the sums need whole matrices, so ranks that hold some
rows of each matrix can do the rest for their rows.

Gradients and weights stay where they are, one tensor a matrix: kernels that touch them are launched once per
matrix. What the optimiser owns is batched.

Bound by memory. Bytes per element, with float32 weights and 16-bit updates: 14 before (gradient and momentum
read, momentum and update written), 12 after (update read twice, weight read and written).
"""
# G matrices of one shape, M rows, N columns; L the longer side, S the shorter

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hotlap.kernels.cpu import muon as cpu
from hotlap.kernels.cpu.library import MACROS
from hotlap.kernels.dispatch import Device, device_facts, jit, kernel_op, tl, use_c, use_triton, wrap_triton
from hotlap.kernels.tiles import Case, Tile, cdiv, next_power_of_2, pick_tile, type_name

EPS = 1e-10
LONGEST_ROW = 8192  # elements that a program keeps in registers


def muon_momentum_ref(grads: Sequence[Tensor], momentum: Tensor, beta: Tensor) -> Tensor:
    """Update momentum (G, M, N) in place with G gradients (M, N), and return the Nesterov update (G, M, N),
    its rows of norm 1."""
    grad = torch.stack(list(grads)).to(momentum.dtype)
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp(momentum, beta)
    return update / (update.norm(dim=-1, keepdim=True) + EPS)


def muon_squares_ref(update: Tensor) -> Tensor:
    """Sums of squares along the shorter side of each matrix."""
    along = -1 if update.shape[-2] >= update.shape[-1] else -2
    return update.to(torch.promote_types(update.dtype, torch.float32)).square().sum(along, keepdim=True)


def muon_factors_ref(squares: Tensor, second_moment: Tensor, S: int, beta2: float) -> Tensor:
    """Update second_moment in place, and return the factors of the update."""
    whole = squares.sum((-2, -1), keepdim=True).sqrt()
    first = S**0.5 / (whole + EPS)  # brings the update to the norm of an orthogonal one
    squares = squares * first.square()
    second_moment.lerp_((squares / S).to(second_moment.dtype), 1 - beta2)
    whole = (squares / (second_moment + EPS)).sum((-2, -1), keepdim=True).sqrt()
    return first * (S**0.5 / (whole + EPS)) * (second_moment + EPS).rsqrt()


def muon_apply_ref(
    weights: Sequence[Tensor], update: Tensor, factors: Tensor, lr: Tensor, decay: Tensor
) -> None:
    """Move G weights (M, N) in place."""
    for weight, scaled in zip(weights, update.to(factors.dtype) * factors, strict=True):
        cautious = (scaled * weight >= 0).to(weight.dtype)
        weight.sub_(lr * (scaled + decay * weight * cautious))


@jit
def _nesterov(grad, momentum, grad_n, momentum_n, n, N, beta):
    """Columns n of the momentum, and of the resulting update."""
    g = tl.load(grad + n * grad_n, n < N, other=0.0).to(tl.float32)
    m = tl.load(momentum + n * momentum_n, n < N, other=0.0).to(tl.float32)
    m += (1.0 - beta) * (g - m)
    return m, m + (1.0 - beta) * (g - m)


# Batches are given whole, with the place of a matrix: compilers would copy a view that a kernel writes to.
@functools.partial(jit, do_not_specialize=["matrix"])
def _muon_momentum_kernel(
    grad, momentum, update, beta, matrix, grad_m, grad_n, momentum_g, momentum_m, momentum_n, M, N, eps,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a matrix. WHOLE: it fits a block and is read once. update is contiguous."""
    row, matrix = tl.program_id(0).to(tl.int64), tl.cast(matrix, tl.int64)
    beta, eps = tl.load(beta).to(tl.float32), tl.cast(eps, tl.float32)
    grad += row * grad_m
    momentum += matrix * momentum_g + row * momentum_m
    update += (matrix * M + row) * N
    n = tl.arange(0, BLOCK).to(tl.int64)
    if WHOLE:
        m, u = _nesterov(grad, momentum, grad_n, momentum_n, n, N, beta)
        norm = tl.sqrt(tl.sum(u * u, 0))  # elements beyond the row are zero
        tl.store(momentum + n * momentum_n, m.to(momentum.dtype.element_ty), n < N)
        tl.store(update + n, (u / (norm + eps)).to(update.dtype.element_ty), n < N)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, N, BLOCK):
            _, u = _nesterov(grad, momentum, grad_n, momentum_n, start + n, N, beta)
            total += u * u
        norm = tl.sqrt(tl.sum(total, 0))
        for start in range(0, N, BLOCK):  # again, from the cache
            at = start + n
            m, u = _nesterov(grad, momentum, grad_n, momentum_n, at, N, beta)
            tl.store(momentum + at * momentum_n, m.to(momentum.dtype.element_ty), at < N)
            tl.store(update + at, (u / (norm + eps)).to(update.dtype.element_ty), at < N)


@jit
def _muon_squares_kernel(
    update, squares, update_g, update_m, update_n, M, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of squares (G, L) of the ROWS, or of the columns, of one block of them in one matrix."""
    blocks = tl.cdiv(M, BLOCK_M) if ROWS else tl.cdiv(N, BLOCK_N)
    matrix, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    update += matrix * update_g
    m, n = tl.arange(0, BLOCK_M)[:, None].to(tl.int64), tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ROWS:
        m += block * BLOCK_M
        for _ in range(0, N, BLOCK_N):
            u = tl.load(update + m * update_m + n * update_n, (m < M) & (n < N), other=0.0).to(tl.float32)
            total += u * u
            n += BLOCK_N
        tl.store(squares + matrix * M + m, tl.sum(total, 1)[:, None], m < M)
    else:
        n += block * BLOCK_N
        for _ in range(0, M, BLOCK_M):
            u = tl.load(update + m * update_m + n * update_n, (m < M) & (n < N), other=0.0).to(tl.float32)
            total += u * u
            m += BLOCK_M
        tl.store(squares + matrix * N + n, tl.sum(total, 0)[None, :], n < N)


@jit
def _muon_factors_kernel(squares, second, factors, second_g, second_l, L, S, beta2, eps, BLOCK: tl.constexpr):
    """From the sums of squares of one matrix, its second moment, and the update's factors (G, L)."""
    matrix = tl.program_id(0).to(tl.int64)
    beta2, eps = tl.cast(beta2, tl.float32), tl.cast(eps, tl.float32)
    squares += matrix * L
    factors += matrix * L
    second += matrix * second_g
    root, i = tl.sqrt(tl.cast(S, tl.float32)), tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, L, BLOCK):
        total += tl.load(squares + start + i, start + i < L, other=0.0)
    first = root / (tl.sqrt(tl.sum(total, 0)) + eps)  # brings the update to the norm of an orthogonal one
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, L, BLOCK):
        at = start + i
        q = tl.load(squares + at, at < L, other=0.0) * first * first
        v = tl.load(second + at * second_l, at < L, other=1.0).to(tl.float32)
        v += (1.0 - beta2) * (q / S - v)
        total += q / (v + eps)
    again = root / (tl.sqrt(tl.sum(total, 0)) + eps)  # and back to it after the second moment
    for start in range(0, L, BLOCK):
        at = start + i
        q = tl.load(squares + at, at < L, other=0.0) * first * first
        v = tl.load(second + at * second_l, at < L, other=1.0).to(tl.float32)
        v += (1.0 - beta2) * (q / S - v)
        tl.store(second + at * second_l, v.to(second.dtype.element_ty), at < L)
        tl.store(factors + at, first * again * tl.rsqrt(v + eps), at < L)


@functools.partial(jit, do_not_specialize=["matrix"])
def _muon_apply_kernel(
    weight, update, factors, lr, decay, matrix, weight_m, weight_n, update_g, update_m, update_n, M, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Move one block of a matrix. Factors are of ROWS, or of columns."""
    across, block, matrix = tl.cdiv(N, BLOCK_N), tl.program_id(0), tl.cast(matrix, tl.int64)
    update += matrix * update_g
    factors += matrix * (M if ROWS else N)
    m = (block // across * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    n = (block % across * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    lr, decay = tl.load(lr).to(tl.float32), tl.load(decay).to(tl.float32)
    # (BLOCK_M, 1) or (1, BLOCK_N)
    factor = tl.load(factors + m, m < M, other=0.0) if ROWS else tl.load(factors + n, n < N, other=0.0)
    u = tl.load(update + m * update_m + n * update_n, inside, other=0.0).to(tl.float32) * factor
    w = tl.load(weight + m * weight_m + n * weight_n, inside, other=0.0).to(tl.float32)
    w -= lr * (u + tl.where(u * w >= 0.0, decay * w, 0.0))
    tl.store(weight + m * weight_m + n * weight_n, w.to(weight.dtype.element_ty), inside)


def _muon_momentum_tiles(N: int, device: Device) -> list[Tile]:
    block = next_power_of_2(min(max(N, 16), LONGEST_ROW))
    warps = min(16, max(1, block // 512))  # 16 numbers a thread, or 8 or 32
    return [_tile(device, count, BLOCK=block) for count in (warps, max(1, warps // 2), min(16, 2 * warps))]


def _muon_squares_tiles(rows: int, device: Device) -> list[Tile]:
    """Blocks that are long in the direction of the sum: few programs have to read fast."""
    sizes = [(4, 512, 4), (8, 256, 4), (1, 1024, 4)] if rows else [(64, 64, 4), (128, 64, 8), (32, 128, 4)]
    return [_tile(device, warps, BLOCK_M=m, BLOCK_N=n) for m, n, warps in sizes]


def _muon_factors_tiles(_: int, device: Device) -> list[Tile]:
    return [_tile(device, warps, BLOCK=block) for block, warps in ((4096, 8), (8192, 8), (2048, 8))]


def _muon_apply_tiles(_: int, device: Device) -> list[Tile]:
    sizes = ((8, 256, 4), (4, 256, 4), (4, 512, 4), (8, 512, 8))
    return [_tile(device, warps, BLOCK_M=m, BLOCK_N=n) for m, n, warps in sizes]


def _tile(device: Device, warps: int, **blocks: int) -> Tile:
    """warps: of 32 threads."""
    return Tile(blocks, max(1, warps * 32 // device.warp))


def _momentum(momentum: Tensor, grads: list[Tensor], beta: Tensor) -> Tensor:
    _, M, N = momentum.shape
    updates = _empty_updates(momentum)
    if updates.numel():
        tile = pick_tile(_muon_momentum_tiles, int(N), device_facts(momentum.device))
        with torch.cuda.device_of(momentum):
            for matrix, grad in enumerate(grads):
                wrap_triton(_muon_momentum_kernel)[(M,)](
                    grad, momentum, updates, beta, matrix, *grad.stride(), *momentum.stride(), M, N, EPS,
                    WHOLE=tile.blocks["BLOCK"] >= N, **tile.arguments,
                )  # fmt: skip
    return updates


def _empty_updates(momentum: Tensor, *_) -> Tensor:
    return torch.empty(momentum.shape, dtype=torch.float16, device=momentum.device)


def _squares(update: Tensor) -> Tensor:
    G, M, N = update.shape
    squares, rows = _empty_squares(update), M >= N
    if update.numel():
        tile = pick_tile(_muon_squares_tiles, int(rows), device_facts(update.device))
        blocks = cdiv(max(M, N), tile.blocks["BLOCK_M" if rows else "BLOCK_N"])
        with torch.cuda.device_of(update):
            wrap_triton(_muon_squares_kernel)[(G * blocks,)](
                update, squares, *update.stride(), M, N, ROWS=rows, **tile.arguments
            )
    return squares


def _empty_squares(update: Tensor) -> Tensor:
    G, M, N = update.shape
    shape = (G, M, 1) if M >= N else (G, 1, N)
    return torch.empty(shape, dtype=torch.float32, device=update.device)


def _factors(squares: Tensor, second_moment: Tensor, S: int, beta2: float) -> Tensor:
    factors = torch.empty(squares.shape, dtype=torch.float32, device=squares.device)
    if squares.numel():
        along = 1 if squares.shape[-1] == 1 else 2  # of length L; not a view, which a compiler would copy
        tile = pick_tile(_muon_factors_tiles, 0, device_facts(squares.device))
        with torch.cuda.device_of(squares):
            wrap_triton(_muon_factors_kernel)[(len(squares),)](
                squares.contiguous(), second_moment, factors, second_moment.stride(0),
                second_moment.stride(along), second_moment.shape[along], S, beta2, EPS, **tile.arguments,
            )  # fmt: skip
    return factors


def _apply(update: Tensor, factors: Tensor, weights: list[Tensor], lr: Tensor, decay: Tensor) -> None:
    _, M, N = update.shape
    if update.numel():
        tile = pick_tile(_muon_apply_tiles, 0, device_facts(update.device))
        blocks = cdiv(M, tile.blocks["BLOCK_M"]) * cdiv(N, tile.blocks["BLOCK_N"])
        rows, factors = factors.shape[-1] == 1, factors.contiguous()
        with torch.cuda.device_of(update):
            for matrix, weight in enumerate(weights):
                wrap_triton(_muon_apply_kernel)[(blocks,)](
                    weight, update, factors, lr, decay, matrix, *weight.stride(), *update.stride(), M, N,
                    ROWS=rows, **tile.arguments,
                )  # fmt: skip


_muon_momentum = kernel_op("muon_momentum", _momentum, _empty_updates, mutates=("momentum",))
_muon_squares = kernel_op("muon_squares", _squares, _empty_squares)
_muon_factors = kernel_op(
    "muon_factors", _factors, lambda squares, *_: torch.empty_like(squares), mutates=("second_moment",)
)
_muon_apply = kernel_op("muon_apply", _apply, lambda *_: None, mutates=("weights",))


def muon_momentum(grads: Sequence[Tensor], momentum: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Update momentum (G, M, N) in place with G gradients (M, N), and return the update for `orthogonalize`.

    Any rows of the matrices. beta: 0-D on their device, so that nothing recompiles when it changes. The
    update (G, M, N) is Nesterov's, with each row divided by its norm: in float16, which the orthogonalisation
    kernels compute in, or in dtype without kernels. Strides do not matter.
    """
    if momentum.dim() != 3 or [grad.shape for grad in grads] != [momentum.shape[1:]] * len(momentum):
        raise ValueError(
            f"momentum is {tuple(momentum.shape)} and gradients are {_shapes(grads)}; needed are (G, M, N) "
            "and G of (M, N)"
        )
    if use_triton(momentum) and dtype != torch.float32:
        return _muon_momentum(momentum, list(grads), beta)
    if _all_float32(momentum, *grads) and dtype in MACROS and use_c(momentum) and momentum.is_contiguous():
        return cpu.momentum_update(momentum, list(grads), beta.item(), dtype, EPS)
    return muon_momentum_ref(grads, momentum, beta).to(dtype)


def _all_float32(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 for x in tensors)


def _shapes(matrices: Sequence[Tensor]) -> str:
    """The shapes that there are, such as `3 of (4, 5)`."""
    counts = Counter(tuple(x.shape) for x in matrices)
    return ", ".join(f"{count} of {shape}" for shape, count in counts.items())


def muon_squares(update: Tensor) -> Tensor:
    """Sums of squares along the shorter side of whole matrices (G, M, N), in float32: (G, M, 1), or (G, 1, N)
    for wide ones.
    """
    return (_muon_squares if use_triton(update) else muon_squares_ref)(update)


def muon_factors(squares: Tensor, second_moment: Tensor, S: int, beta2: float) -> Tensor:
    """Update second_moment in place, and return the factors of the update. All have the shape of squares.

    second_moment: running mean square along the shorter side, whose length is S. The scaled update has the
    norm of an orthogonal matrix, S^0.5.
    """
    if squares.shape != second_moment.shape:
        shapes = f"squares are {tuple(squares.shape)} and second_moment {tuple(second_moment.shape)}"
        raise ValueError(f"{shapes}; needed are (G, M, 1) twice, or (G, 1, N) for wide matrices")
    return (_muon_factors if use_triton(squares) else muon_factors_ref)(squares, second_moment, S, beta2)


def muon_apply(weights: Sequence[Tensor], update: Tensor, factors: Tensor, lr: Tensor, decay: Tensor) -> None:
    """Move G weights (M, N) by the orthogonalised update (G, M, N) times factors, in place.

    Any rows of the matrices. factors: (G, M, 1) or (G, 1, N). lr: step size; decay: the share of the weight
    to remove per unit of lr. Both 0-D on the device of the weights, so that nothing recompiles. Strides do
    not matter.
    """
    G, M, N = update.shape if update.dim() == 3 else (0, 0, 0)
    fits = tuple(factors.shape) in ((G, M, 1), (G, 1, N))
    if update.dim() != 3 or [weight.shape for weight in weights] != [update.shape[1:]] * G or not fits:
        raise ValueError(
            f"weights are {_shapes(weights)}, update is {tuple(update.shape)} and factors "
            f"{tuple(factors.shape)}; needed are G of (M, N), (G, M, N), and (G, M, 1) or (G, 1, N)"
        )
    if use_triton(update):
        _muon_apply(update, factors, list(weights), lr, decay)
    elif use_c(update) and _all_float32(*weights, factors):
        cpu.apply(list(weights), update, factors, lr.item(), decay.item())
    else:
        muon_apply_ref(weights, update, factors, lr, decay)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: twelve matrices of d24, tall and wide, with gradients and updates of
    the dtype; and rows too long for a program."""
    t, scalar, (G, L, S) = f"*{type_name(dtype)}", "*fp32", (12, 6144, 1536)
    sizes, matrix = {"M": "i32", "N": "i32"}, {"matrix": "i32"}

    def strides(name: str) -> dict:
        return {f"{name}_g": "i32", f"{name}_m": "i32", f"{name}_n": 1}

    def of_momentum(M: int, N: int) -> Case:
        def run(device):
            grad = torch.randn(G, M, N, device=device, dtype=dtype)
            momentum, beta = torch.zeros_like(grad, dtype=torch.float32), torch.tensor(0.95, device=device)
            return lambda: _momentum(momentum, list(grad), beta)

        arguments = {"grad": t, "momentum": "*fp32", "update": "*fp16", "beta": scalar, "eps": "fp64"}
        arguments |= strides("grad") | strides("momentum") | sizes | matrix | {"WHOLE": N <= LONGEST_ROW}
        return Case("_muon_momentum_kernel", arguments, _muon_momentum_tiles, N, run)

    def run_apply(M: int, N: int, device: torch.device):
        weight = torch.randn(G, M, N, device=device)
        update, lr = weight.to(dtype), torch.tensor(1e-3, device=device)
        second = torch.zeros_like(_empty_squares(update))

        def launch():
            _apply(update, _factors(_squares(update), second, S, 0.9), list(weight), lr, lr)

        return launch

    def of_apply(M: int, N: int) -> list[Case]:
        run, name, rows = functools.partial(run_apply, M, N), "tall" if M > N else "wide", {"ROWS": M > N}
        squares = {"update": t, "squares": "*fp32"} | strides("update") | sizes | rows
        step = {"weight": "*fp32", "update": t, "factors": "*fp32", "lr": scalar, "decay": scalar}
        step |= strides("weight") | strides("update") | sizes | matrix | rows
        return [
            Case("_muon_squares_kernel", squares, _muon_squares_tiles, int(M > N), run, name),
            Case("_muon_apply_kernel", step, _muon_apply_tiles, 0, run, name),
        ]

    factors = {"squares": "*fp32", "second": "*fp32", "factors": "*fp32", "second_g": "i32", "second_l": 1}
    factors |= {"L": "i32", "S": "i32", "beta2": "fp64", "eps": "fp64"}
    return [
        *(of_momentum(S, N) for N in (S, L, 2 * LONGEST_ROW)), *of_apply(L, S), *of_apply(S, L),
        Case("_muon_factors_kernel", factors, _muon_factors_tiles, 0, functools.partial(run_apply, L, S)),
    ]  # fmt: skip

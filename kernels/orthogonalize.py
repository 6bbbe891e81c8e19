"""The nearest semi-orthogonal matrix, which is Muon's update: U V^T of the singular value decomposition.

Five odd polynomials a X + b (X X^T) X + c (X X^T)^2 X drive all singular values to 1. Those of Polar Express
(Amsel et al., 2025) are optimal at each step for values in [1e-3, 1]; Newton-Schulz, Muon's original choice,
uses one polynomial five times (Jordan et al., 2024). Both need values of at most 1, so X is divided by its
Frobenius norm and a safety factor of 1.01.

With G = X X^T, or X^T X where X is tall, a step is X <- Z X with Z = a I + b G + c G^2. Long matrices take
the Gram form: the next G is Z G Z, so several steps run on small matrices only, before X is multiplied by the
product of their Z. In half precision G soon gets negative eigenvalues, which no Gram matrix has, and the
polynomials amplify them. Hence the restart after two steps (G recomputed from X), float16 with three more
bits than bfloat16, and exact symmetry. The kernels scale X to the norm of an orthogonal matrix, n^0.5, with
the norm in float32, and divide the first polynomial's coefficients by the rest: at a norm of 1, the
off-diagonal elements of G would be below float16's normal range.

Bound by matmuls. FLOPs for matrices of n x alpha n and five steps, in units of n^3: 20 alpha + 10 in plain
torch; 15 alpha + 5 where the symmetric matmuls compute one half; 6 alpha + 17 in the Gram form.

The symmetric matmul has two forms. The plain one uses pointers, and each program computes one tile. The form
for devices with a TMA is persistent: one program per processor, which takes block after block and addresses
them by tensor descriptors. Its blocks may be two tiles wide, which suits Hopper's tensor cores but computes
more: of a triangle with twelve rows, 84 tiles instead of 78. `hotlap bench tune` measures which is best.
"""
# n the shorter side of a matrix, K the longer

from __future__ import annotations

import torch
from torch import Tensor

from hotlap.kernels.dispatch import (
    Device,
    allow_descriptors,
    constant,
    device_facts,
    jit,
    kernel_op,
    no_autocast,
    tl,
    use_triton,
    wrap_triton,
)
from hotlap.kernels.tiles import Case, Tile, cdiv, fitting_tiles, pick_tile, tuned, type_name

Polynomial = tuple[float, float, float]
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.01
EPS = 1e-6
RESTART = 2  # steps of the Gram form before G is recomputed: in float16, one is too few and three too many
# K / n from which the Gram form is used where `hotlap bench tune` has not measured it: by FLOPs it is 1.2
# times as fast there, and not at 1.
GRAM_ASPECT = 2
GRAM_CHOICE = "orthogonalize gram aspect"  # what tune calls it


def orthogonalize_ref(
    x: Tensor, polynomials: tuple[Polynomial, ...] = POLAR_EXPRESS, norm: float | None = None
) -> Tensor:
    """The specification. x: (..., M, N); computes in and returns the dtype of x."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the short side is the small one
    x = (x / (SAFETY * (_frobenius(x) + EPS if norm is None else norm))).to(x.dtype)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _frobenius(x: Tensor) -> Tensor:
    """(..., 1, 1), in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=dtype)


@jit
def _triangle(place):
    """Row i and column j <= i of a place in a triangle, which counts row by row: i (i + 1) / 2 + j."""
    i = ((tl.sqrt(8.0 * place + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > place, i - 1, i)  # correct the rounded root
    i = tl.where((i + 1) * (i + 2) // 2 <= place, i + 1, i)
    return i, place - i * (i + 1) // 2


@jit
def _symmetric_kernel(
    x, y, added, out, scale, weight, diagonal, n, K,
    TALL: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile, on or below the diagonal, of a symmetric matmul, and its mirror image."""
    scale, weight = tl.cast(scale, tl.float32), tl.cast(weight, tl.float32)
    diagonal = tl.cast(diagonal, tl.float32)
    tiles = tl.cdiv(n, TILE)
    count = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // count).to(tl.int64)  # offsets pass 2^31
    i, j = _triangle(tl.program_id(0) % count)
    m, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
    row, column = i * TILE, j * TILE  # the first ones; offsets from them fit 32 bits
    along = 1 if TALL else K  # elements between neighbours along n
    x += matrix * n * K + row.to(tl.int64) * along
    y += matrix * n * K + column.to(tl.int64) * along
    if TALL:
        at, step = k[:, None] * n + m[None, :], tl.cast(n, tl.int64) * DEPTH  # (DEPTH, TILE), elements
        left_in, right_in = (m < n - row)[None, :], (m < n - column)[None, :]
    else:
        at, step = m[:, None] * K + k[None, :], DEPTH  # (TILE, DEPTH)
        left_in, right_in = (m < n - row)[:, None], (m < n - column)[:, None]
    lefts, rights = x + at, y + at
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, DEPTH):
        real = (k < K - start)[:, None] if TALL else (k < K - start)[None, :]
        left = tl.load(lefts, left_in & real, other=0.0)
        right = tl.load(rights, right_in & real, other=0.0)
        total = tl.dot(tl.trans(left), right, total) if TALL else tl.dot(left, tl.trans(right), total)
        lefts += step
        rights += step
    inside = (m < n - row)[:, None] & (m < n - column)[None, :]
    at = m[:, None] * n + m[None, :]
    first = matrix * n * n + row.to(tl.int64) * n + column
    total *= scale
    if added is not None:
        total += weight * tl.load(added + first + at, inside, other=0.0).to(tl.float32)
    if i == j:
        total += tl.where(m[:, None] == m[None, :], diagonal, 0.0)
    value = total.to(out.dtype.element_ty)
    if i == j:
        value = tl.where(m[:, None] >= m[None, :], value, tl.trans(value))
    tl.store(out + first + at, value, inside)
    if i != j:
        mirror = matrix * n * n + column.to(tl.int64) * n + row
        tl.store(out + mirror + at, tl.trans(value), (m < n - column)[:, None] & (m < n - row)[None, :])


@jit
def _symmetric_tma_kernel(
    x, y, added, out, scale, weight, diagonal, G, n, K,
    TALL: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same for matrices that `_tma_takes`, by persistent programs. Blocks of TILE x WIDTH.

    WIDTH is TILE or twice as much. The triangle is then of squares of WIDTH, each of WIDTH / TILE blocks.
    Descriptors read zeros beyond a matrix, and write nothing there.
    """
    scale, weight = tl.cast(scale, tl.float32), tl.cast(weight, tl.float32)
    diagonal = tl.cast(diagonal, tl.float32)
    apart, whole = tl.cast(n, tl.int64) * K, tl.cast(n, tl.int64) * n  # elements of a matrix
    if TALL:
        lefts = tl.make_tensor_descriptor(x, [G, K, n], [apart, n, 1], [1, DEPTH, TILE])
        rights = tl.make_tensor_descriptor(y, [G, K, n], [apart, n, 1], [1, DEPTH, WIDTH])
    else:
        lefts = tl.make_tensor_descriptor(x, [G, n, K], [apart, K, 1], [1, TILE, DEPTH])
        rights = tl.make_tensor_descriptor(y, [G, n, K], [apart, K, 1], [1, WIDTH, DEPTH])
    results = tl.make_tensor_descriptor(out, [G, n, n], [whole, n, 1], [1, TILE, TILE])
    addends = results
    if added is not None:
        addends = tl.make_tensor_descriptor(added, [G, n, n], [whole, n, 1], [1, TILE, TILE])
    BLOCKS: tl.constexpr = WIDTH // TILE
    squares = tl.cdiv(n, WIDTH)
    count = squares * (squares + 1) // 2 * BLOCKS
    # one loop over blocks and K, so that the next block's operands load while this one is written
    for block in tl.range(tl.program_id(0), G * count, tl.num_programs(0), flatten=True):
        matrix, place = block // count, block % count
        i, j = _triangle(place // BLOCKS)
        row, column = i * WIDTH + place % BLOCKS * TILE, j * WIDTH
        total = tl.zeros((TILE, WIDTH), tl.float32)
        for k in range(0, K, DEPTH):
            if TALL:
                left = lefts.load([matrix, k, row]).reshape(DEPTH, TILE).T
                right = rights.load([matrix, k, column]).reshape(DEPTH, WIDTH)
            else:
                left = lefts.load([matrix, row, k]).reshape(TILE, DEPTH)
                right = rights.load([matrix, column, k]).reshape(WIDTH, DEPTH).T
            total = tl.dot(left, right, total)
        if BLOCKS == 1:
            _write(total, added, addends, results, scale, weight, diagonal, matrix, row, column, TILE)
        else:
            first, second = tl.split(total.reshape(TILE, 2, TILE).permute(0, 2, 1))
            _write(first, added, addends, results, scale, weight, diagonal, matrix, row, column, TILE)
            column = tl.where(column < row, column + TILE, n)  # beyond the diagonal, nowhere
            _write(second, added, addends, results, scale, weight, diagonal, matrix, row, column, TILE)


@jit
def _write(
    total, added, addends, results, scale, weight, diagonal, matrix, row, column, TILE: tl.constexpr
):  # fmt: skip
    """Write the tile at a row and a column of a matrix, and its mirror image."""
    total *= scale
    if added is not None:
        addend = addends.load([matrix, row, column]).reshape(TILE, TILE)
        total += weight * addend.to(tl.float32)
    m, n = row + tl.arange(0, TILE)[:, None], column + tl.arange(0, TILE)[None, :]
    value = (total + tl.where(m == n, diagonal, 0.0)).to(results.dtype)
    if row == column:
        value = tl.where(m >= n, value, tl.trans(value))
    else:
        results.store([matrix, column, row], tl.trans(value).reshape(1, TILE, TILE))
    results.store([matrix, row, column], value.reshape(1, TILE, TILE))


def _symmetric_tiles(_: int, device: Device) -> list[Tile]:
    """Tiles of the form with descriptors come last, because they have to be measured."""
    sizes, ahead = [(128, 64, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 8, 4), (64, 64, 4, 3)], 0
    if device.warp == 64:
        sizes, ahead = [(128, 64, 8, 2), (128, 64, 4, 2), (128, 32, 8, 3), (64, 64, 4, 2)], 1  # in registers
    plain = [
        # two tiles of 16-bit numbers a stage, and barriers
        Tile({"TILE": tile, "DEPTH": depth}, warps, stages, shared=4 * (stages - ahead) * tile * depth + 64)
        for tile, depth, warps, stages in sizes
    ]
    sizes = [(64, 128, 64, 4, 3), (128, 128, 32, 8, 2), (64, 64, 64, 4, 4)]
    if device.shared_memory >= 200 << 10:  # datacenter Hopper and Blackwell
        sizes = [(128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4)]
    tma = [
        # and two tiles of the result, and more barriers
        Tile({"TILE": tile, "WIDTH": width, "DEPTH": depth}, warps, stages, kernel="_symmetric_tma_kernel",
             shared=2 * stages * depth * (tile + width) + 4 * tile * tile + 256)
        for tile, width, depth, warps, stages in sizes if device.tma
    ]  # fmt: skip
    return plain + tma


def _symmetric(
    x: Tensor,
    y: Tensor,
    tall: bool = False,
    scale: float = 1.0,
    added: Tensor | None = None,
    weight: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """scale x y^T + weight added + diagonal I, which must be symmetric; x^T y instead if tall.

    x, y: (G, n, K), or (G, K, n) where tall. added and the result: (G, n, n).
    """
    G, n, K = x.mT.shape if tall else x.shape
    out = torch.empty((G, n, n), dtype=x.dtype, device=x.device)
    if out.numel():
        x, y, added = x.contiguous(), y.contiguous(), None if added is None else added.contiguous()
        device = device_facts(x.device)
        tile = pick_tile(_symmetric_tiles, 0, device)
        if tile.kernel and not all(map(_tma_takes, (x, y, out, out if added is None else added))):
            tile = fitting_tiles(_symmetric_tiles, 0, device)[0]  # a plain one
        given = x, y, added, out, scale, weight, diagonal
        with torch.cuda.device_of(x):
            if tile.kernel:
                squares = cdiv(n, tile.blocks["WIDTH"])
                blocks = G * squares * (squares + 1) // 2 * (tile.blocks["WIDTH"] // tile.blocks["TILE"])
                allow_descriptors()
                wrap_triton(_symmetric_tma_kernel)[(min(blocks, device.processors),)](
                    *given, G, n, K, TALL=tall, **tile.arguments
                )
            else:
                tiles = cdiv(n, tile.blocks["TILE"])
                wrap_triton(_symmetric_kernel)[(G * tiles * (tiles + 1) // 2,)](
                    *given, n, K, TALL=tall, **tile.arguments
                )
    return out


def _tma_takes(x: Tensor) -> bool:
    """Whether there are rows, at multiples of 16 bytes. x is contiguous; torch aligns storages."""
    aligned = x.shape[-1] * x.itemsize % 16 == 0 and x.storage_offset() * x.itemsize % 16 == 0
    return aligned and x.numel() > 0


def _fake(x, y, tall=False, scale=1.0, added=None, weight=0.0, diagonal=0.0):
    n = x.shape[2 if tall else 1]
    return torch.empty((x.shape[0], n, n), dtype=x.dtype, device=x.device)


_symmetric_product = kernel_op("symmetric_product", _symmetric, _fake)


def _runs_kernels(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float32  # float32 is for machines without 16-bit matmuls


def _as_batch(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _steps(x: Tensor, polynomials: tuple[Polynomial, ...], norm: float, aspect: float) -> Tensor:
    """x: (G, M, N), with Frobenius norms of at most norm. aspect: K / n from which the Gram form is used."""
    tall = x.shape[1] > x.shape[2]
    for (a, b, c), *more in _stages(*x.shape[1:], _divided(polynomials, SAFETY * norm), aspect):
        gram = _symmetric_product(x, x, tall)  # (G, n, n), as all but x
        factor = factors = _symmetric_product(gram, gram, False, c, gram, b, a)
        for a, b, c in more:
            # all of Z G: mirroring one half would be less exact for the small eigenvalues of G
            gram = _symmetric_product(factor @ gram, factor)
            factor = _symmetric_product(gram, gram, False, c, gram, b, a)
            factors = _symmetric_product(factors, factor)
        x = x @ factors if tall else factors @ x
    return x


def _torch_steps(x: Tensor, polynomials: tuple[Polynomial, ...]) -> Tensor:
    """The same in torch, for x (G, M, N) with Frobenius norms of at most 1. Sums are rounded once.

    In float32 or wider, long matrices take the Gram form. It needs more bits than bfloat16, and so does a Z
    with a I in it: a X is added to the last product instead.
    """
    if x.shape[1] > x.shape[2]:
        return _torch_steps(x.mT, polynomials).mT
    aspect = float("inf") if x.itemsize < 4 else GRAM_ASPECT
    for (a, b, c), *more in _stages(*x.shape[1:], polynomials, aspect):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (G, n, n), Z - a I
        if not more:
            x = torch.baddbmm(x, factor, x, beta=a)
            continue
        factor.diagonal(dim1=1, dim2=2).add_(a)
        factors = factor
        for a, b, c in more:
            gram = factor @ gram @ factor
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            factors = factor @ factors
        x = factors @ x
    return x


def _divided(polynomials: tuple[Polynomial, ...], by: float) -> tuple[Polynomial, ...]:
    """The same polynomials, the first applied to x / by."""
    (a, b, c), *others = polynomials
    return (a / by, b / by**3, c / by**5), *others


@constant
def gram_aspect(device: torch.device) -> float:
    """K / n from which the Gram form is used on a device, as measured there or by default."""
    if device.type != "cuda":
        return GRAM_ASPECT
    return float(tuned(device_facts(device)).choices.get(GRAM_CHOICE, GRAM_ASPECT))


def _stages(
    M: int, N: int, polynomials: tuple[Polynomial, ...], aspect: float
) -> list[tuple[Polynomial, ...]]:
    """The polynomials in groups: G is recomputed from X before each group."""
    if max(M, N) >= aspect * min(M, N):
        return [part for part in (polynomials[:RESTART], polynomials[RESTART:]) if part]
    return [(polynomial,) for polynomial in polynomials]


def orthogonalize(
    x: Tensor, polynomials: tuple[Polynomial, ...] = POLAR_EXPRESS, norm: float | None = None
) -> Tensor:
    """Polar factor of each matrix of x (..., M, N), singular values within about 0.7 to 1.2 of 1. Same
    dtype.

    The kernels compute in float16 for any dtype of x, and take no gradient. norm: an upper bound on the
    Frobenius norms of x, at most 255 (M^0.5 after `muon_momentum`); if given, x is not read to compute it.
    """
    if not _runs_kernels(x):
        batch = _as_batch(x)
        bound = _frobenius(batch) + EPS if norm is None else norm
        with no_autocast(x):
            return _torch_steps((batch / (SAFETY * bound)).to(x.dtype), polynomials).reshape(x.shape)
    if norm is None:
        norm = max(1, min(x.shape[-2:])) ** 0.5
        scaled = torch.empty(x.shape, dtype=torch.float16, device=x.device)
        torch.mul(x, norm / (_frobenius(x) + EPS), out=scaled)  # one pass, rounded once
        x, dtype = scaled, x.dtype
    else:
        x, dtype = x.to(torch.float16), x.dtype
    steps = _steps(_as_batch(x), polynomials, norm, gram_aspect(x.device))
    return steps.view(x.shape).to(dtype)


def cases(dtype: torch.dtype) -> list[Case]:
    """For the static gate and the tuner: X X^T, X^T X, and a polynomial of it."""
    if dtype == torch.float32:
        return []
    t = f"*{type_name(dtype)}"
    pointers, sizes = {"x": t, "y": t, "out": t}, dict.fromkeys(("G", "n", "K"), "i32")
    scalars = dict.fromkeys(("scale", "weight", "diagonal"), "fp64")

    def of(size: int, K: int, tall: bool, polynomial: bool) -> Case:
        def run(device):
            x = torch.randn(12, *((K, size) if tall else (size, K)), device=device, dtype=dtype) * K**-0.5
            if polynomial:
                return lambda: _symmetric(x, x, False, 0.5, x, -2.0, 3.0)
            return lambda: _symmetric(x, x, tall)

        variant = "polynomial" if polynomial else "tall" if tall else "wide"
        arguments = pointers | {"added": t if polynomial else None} | sizes | scalars | {"TALL": tall}
        return Case("_symmetric_kernel", arguments, _symmetric_tiles, 0, run, variant)

    return [of(1536, 6144, False, False), of(1536, 6144, True, False), of(1536, 1536, False, True)]

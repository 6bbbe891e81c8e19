"""Kernels that the static gate has to reject, each for its own reason."""

from hotlap.kernels.dispatch import jit, tl
from hotlap.kernels.tiles import Case, Tile


@jit
def spills_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i).to(tl.float32)
    for _ in range(n):  # all of v is alive at once, and too much for the registers
        v += tl.sum(v * v, 0) * v
    tl.store(y + i, v.to(y.dtype.element_ty))


@jit
def oversize_kernel(x, y, n, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK):
        a = tl.load(x + i * n + k + j)
        total = tl.dot(a, tl.trans(tl.load(x + j * n + k + i)), total)
    tl.store(y + i * BLOCK + j, total.to(y.dtype.element_ty))


@jit
def narrow_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * n))


@jit
def float64_kernel(x, y, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, (tl.load(x + i) * scale).to(y.dtype.element_ty))


@jit
def crowded_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@jit
def descriptor_kernel(x, y, n, BLOCK: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, [n, BLOCK], [BLOCK, 1], [8, BLOCK])
    i, j = tl.arange(0, 8)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(y + i * BLOCK + j, rows.load([0, 0]))


def cases(dtype):
    tiles = {
        "spills_kernel": Tile({"BLOCK": 32768}, warps=4),
        "oversize_kernel": Tile({"BLOCK": 128}, warps=8, stages=5),
        "narrow_kernel": Tile({"BLOCK": 2048}),
        "float64_kernel": Tile({"BLOCK": 2048}),
        "descriptor_kernel": Tile({"BLOCK": 64}),
        "crowded_kernel": Tile({"BLOCK": 8192}, warps=16, per_processor=5),
    }

    def case(kernel, tile):
        arguments = {"x": "*bf16", "y": "*bf16", "n": "i32", "scale": "fp64"}
        return Case(kernel, arguments, lambda size, device: [tile], 0, run=None)

    return [case(kernel, tile) for kernel, tile in tiles.items()]

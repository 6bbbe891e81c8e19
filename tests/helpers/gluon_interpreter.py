"""Runs kernels in Gluon on a CPU: `run_on_cpu(monkeypatch, modules)`.

Each partition of a program is a thread. Barriers count arrivals and bytes as the hardware's do, copies happen
at once, and products when they are waited for, so that what is read too late, or never arrives, is found. It
knows what our kernels use. Layouts mean nothing here.
"""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gluon_language

PATIENCE = 20.0  # seconds until a wait is a deadlock


class Value(torch.Tensor):
    """What a program holds in registers."""

    type = SimpleNamespace(layout=None)


def value(x: torch.Tensor) -> Value:
    return x.as_subclass(Value)


class Pointer:
    def __init__(self, base: torch.Tensor, offset: Any = 0):
        self.base, self.offset = base, offset

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)


class Descriptor:
    """Of a `TensorDescriptor`, what a program sees."""

    def __init__(self, given):
        self.dtype, self.block_shape, self.layout = given.base.dtype, list(given.block_shape), None
        self.whole = given.base.as_strided(given.shape, given.strides)
        nbytes = math.prod(given.block_shape) * given.base.itemsize
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def window(self, place) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """The part of a block that lies in the tensor, and where in the block it lies."""
        assert all(start >= 0 for start in place)
        spans = [
            (start, max(0, min(n, size - start)))
            for start, n, size in zip(place, self.block_shape, self.whole.shape, strict=True)
        ]
        inside = tuple(slice(start, start + n) for start, n in spans)
        return self.whole[inside], tuple(slice(0, n) for _, n in spans)


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: torch.Tensor):
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i):
        return Shared(self.data[i])

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return value(self.data.clone())

    def store(self, x):
        assert x.dtype == self.dtype
        self.data.copy_(x)


class Barrier:
    def __init__(self):
        self.changed = threading.Condition()

    def start(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes, self.phase = 0, 0

    def change(self, arrivals: int, missing_bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += missing_bytes
            assert self.missing >= 0, "more arrivals than were announced"
            if self.missing == 0 and self.bytes == 0:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise TimeoutError("a deadlock")


class Product:
    """One that was started and not waited for yet."""

    def __init__(self, a, b, total):
        self.operands, self.result = (a, b, total), None

    def finish(self) -> None:
        a, b = (x.data if isinstance(x, Shared) else x.as_subclass(torch.Tensor) for x in self.operands[:2])
        total = self.operands[2]
        total = total.result if isinstance(total, Product) else total
        product = value(a.float() @ b.float())
        self.result = product if total is None else total + product


started = threading.local()  # the products of a partition that were not waited for


def warpgroup_mma(a, b, total, use_acc=True, is_async=False):
    product = Product(a, b, total if use_acc else None)
    started.products = [*getattr(started, "products", []), product]
    return product


def warpgroup_mma_wait(count, products):
    products_left = len(started.products) - count
    for product in started.products[:products_left]:
        product.finish()
    started.products = started.products[products_left:]
    assert products[0].result is not None, "not waited for"
    return products[0].result


def copy_in(descriptor, place, barrier, tile):
    tile.data.zero_()
    part, inside = descriptor.window(place)
    tile.data[inside] = part
    barrier.change(0, -descriptor.block_type.nbytes)


def copy_out(descriptor, place, tile):
    part, inside = descriptor.window(place)
    part.copy_(tile.data[inside])


def allocate(dtype, shape, layout):
    if dtype == "barrier":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=barriers.__getitem__)
    return Shared(torch.full(shape, math.nan, dtype=dtype))


def load(pointer, mask=True, other=0):
    if isinstance(pointer.offset, int):
        return pointer.base[pointer.offset].item()
    offset = torch.where(torch.as_tensor(mask), pointer.offset, 0)
    found = torch.where(torch.as_tensor(mask), pointer.base[offset], other)
    return value(found.to(pointer.base.dtype))


def store(pointer, x, mask):
    pointer.base[pointer.offset[mask]] = x[mask]


def pick(condition, a, b):
    if isinstance(condition, bool):
        return a if condition else b
    return value(torch.where(condition, a, b))


def extreme(of_numbers, of_tensors):
    def function(a, b):
        if isinstance(a, int) and isinstance(b, int):
            return of_numbers(a, b)
        return value(of_tensors(torch.as_tensor(a), torch.as_tensor(b)))

    return function


def warp_specialize(partitions, warps, registers):
    errors = []

    def run(function, arguments):
        try:
            with torch.no_grad():  # which is of a thread
                function(*arguments)
            assert not getattr(started, "products", []), "products that nobody waits for"
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


program = SimpleNamespace(id=0)


def new(shape, x, dtype):
    return value(torch.full(shape, x, dtype=dtype))


class Language(SimpleNamespace):
    def __getattr__(self, name):
        """What runs outside of kernels is Gluon's own."""
        return getattr(gluon_language, name)


language = Language(
    int64="barrier",  # all that is of this type in shared memory
    float32=torch.float32,
    minimum=extreme(min, torch.minimum),
    maximum=extreme(max, torch.maximum),
    cdiv=lambda a, b: -(-a // b),
    cast=lambda x, dtype: x,
    where=pick,
    load=load,
    store=store,
    arange=lambda start, end, layout: value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout: new(shape, 0.0, dtype),
    full=lambda shape, x, dtype, layout: new(shape, x, dtype),
    full_like=torch.full_like,
    exp2=torch.exp2,
    log2=torch.log2,
    max=torch.amax,
    sum=torch.sum,
    convert_layout=lambda x, layout: x,
    allocate_shared_memory=allocate,
    program_id=lambda axis: program.id,
    static_range=range,
    warp_specialize=warp_specialize,
    NVMMADistributedLayout=lambda *_: None,
    SliceLayout=lambda *_: None,
    DotOperandLayout=lambda *_: None,
)
BARRIERS = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=lambda barrier, count: barrier.start(count),
    expect=lambda barrier, nbytes: barrier.change(1, nbytes),
    arrive=lambda barrier, count: barrier.change(count, 0),
    wait=lambda barrier, parity: barrier.wait(parity),
)
COPIES = SimpleNamespace(
    async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=lambda count: None
)
NAMES = {
    "gl": language,
    "tl": language,
    "mbarrier": BARRIERS,
    "tma": COPIES,
    "fence_async_shared": lambda: None,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


class Kernel:
    """A function in place of the compiled kernel, launched as one is."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, num_stages, **flags):
            given = []
            for x in arguments:
                if isinstance(x, torch.Tensor):
                    x = Pointer(x.detach().view(-1))
                elif hasattr(x, "block_shape"):
                    x = Descriptor(x)
                given.append(x)
            for i in range(grid[0]):
                program.id = i
                self.function(*given, **flags)

        return launch


def run_on_cpu(monkeypatch, *modules) -> None:
    """Put all of this in the place of Gluon in modules whose kernels were not compiled."""
    for module in modules:
        for name, instead in NAMES.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, instead)

"""What a run compiles, at the sizes of d12 and d24, through Inductor for sm_90. Run by test_stand_in.py.

Tensors have no memory (FakeTensors on cuda). torch.compile is `codegen.inductor`, which takes no graph break.
The plugin fails a test for a spill in a default tile.
"""

import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from gpu_stand_in import codegen, patches
from gpu_stand_in.triton_gpu import seen
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from hotlap.kernels import attention, linear_relu2
from hotlap.kernels.cross_entropy import cross_entropy
from hotlap.kernels.fp8 import linear_relu2_fp8
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy
from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum, muon_squares
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.kernels.rms_norm import rms_norm
from hotlap.kernels.tiles import fitting_tiles
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.kv_cache import KVCache, Span
from hotlap.train.distributed import sharding
from hotlap.train.distributed.world import World

BF16, F32, F16, I64 = torch.bfloat16, torch.float32, torch.float16, torch.int64
BLOCK = {  # the kernels of a block, forward and backward, but for attention's, of which compilers see nothing
    "_rms_norm_forward_kernel",
    "_rms_norm_backward_kernel",
    "_qkv_forward_kernel",
    "_qkv_backward_kernel",
    "_linear_relu2_tma_kernel",
}


@pytest.fixture(autouse=True)
def fake():
    """No memory, nothing compiled before, and no copies of what kernels write."""
    torch._dynamo.reset()
    seen.loaded.clear()
    codegen.GENERATED.clear()
    codegen.COPIED.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    assert not codegen.COPIED, "copied before a kernel that is seen to write them"


@pytest.fixture(scope="module")
def world():
    """Rank 0 of two, whose exchanges do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2, torch.device("cuda", 0), None)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(world):
    """Made where its ranks are numbers with memory."""
    return sharding.mesh_of(world)


def two_layers(depth: int) -> GPTConfig:
    """Of a model of this depth: one that sees a window, and one that sees all and has value embeddings."""
    return dataclasses.replace(GPTConfig.from_depth(depth), layers=2)


def test_every_name_that_the_stand_in_replaces_is_there():
    assert not patches.MISSING, f"gone from their libraries: {', '.join(patches.MISSING)}"


def empty(dtype: torch.dtype, *shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def names() -> set[str]:
    return {kernel.name for kernel in seen.loaded}


def generated() -> set[str]:
    """The words in the names of Inductor's own kernels, which say what each of them does."""
    kernels = re.findall(r"\bdef (triton_\w+)\(", "\n".join(codegen.GENERATED))
    return {word for kernel in kernels for word in kernel.split("_")}


@pytest.mark.parametrize(
    ("depth", "recompute"), [(12, "none"), (12, "selective"), (24, "none"), (24, "block")]
)
def test_a_sharded_and_compiled_model_compiles(depth, recompute, world, mesh, monkeypatch):
    """FSDP2 around compiled blocks, forward and backward."""
    monkeypatch.setattr(sharding, "mesh_of", lambda _: mesh)
    with torch.device("meta"):
        model = GPT(two_layers(depth), BF16)
    sharding.parallelize(model, world, recompute, compile=True)
    model.to_empty(device="cuda")
    ids = empty(I64, 2, 2048)
    model(ids, ids, document_start=ids).backward()
    assert names() >= BLOCK
    assert len(codegen.GENERATED) == 4  # forward and backward of the two kinds of blocks


@pytest.mark.parametrize("depth", [12, 24])
def test_a_model_on_one_rank_compiles(depth, monkeypatch):
    """Without documents, and with our attention where torch has none: whether it has is asked of the GPU."""
    monkeypatch.setattr(attention, "sdpa_takes", lambda *_: False)
    with torch.device("cuda"):
        model = GPT(two_layers(depth), BF16)
    sharding.parallelize(model, World(0, 1, torch.device("cuda", 0), None), "none", compile=True)
    ids = empty(I64, 2, 2048)
    model(ids, ids).backward()
    assert names() >= BLOCK
    # our kernels scale and gate, no gradient is joined from parts, and nothing is copied
    assert "add" in generated() and not generated() & {"mul", "sigmoid", "cat", "clone"}


@pytest.mark.parametrize("depth", [12, 24])
def test_a_step_of_muon_compiles(depth):
    """Each shape of a block's matrices."""
    width = GPTConfig.from_depth(depth).width

    @torch.compile(dynamic=False)
    def step(grads, momentum, weights, second, scalar):
        M, N = momentum.shape[1:]
        update = muon_momentum(grads, momentum, scalar, BF16)
        update = orthogonalize(update, norm=M**0.5)
        factors = muon_factors(muon_squares(update).view_as(second), second, min(M, N), 0.9)
        muon_apply(weights, update, factors, scalar, scalar)

    for M, N in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        second = empty(F32, 2, M, 1) if M >= N else empty(F32, 2, 1, N)
        grads, weights = ([empty(F32, M, N) for _ in range(2)] for _ in range(2))
        step(grads, empty(F32, 2, M, N), weights, second, empty(F32))
    assert names() >= {"_muon_momentum_kernel", "_muon_squares_kernel", "_muon_apply_kernel"}
    assert names() >= {"_muon_factors_kernel"} and names() & {"_symmetric_kernel", "_symmetric_tma_kernel"}
    assert len(codegen.GENERATED) == 4


@pytest.mark.parametrize("tokens", [1, 100], ids=["a token", "a prompt"])
@pytest.mark.parametrize("depth", [12, 24])
def test_a_step_of_decoding_compiles(depth, tokens):
    config = two_layers(depth)
    with torch.device("cuda"):
        model = GPT(config, BF16).for_inference()

    @torch.compile(dynamic=False)
    def step(ids):
        return model(ids, cache=cache)

    with torch.no_grad():
        cache = KVCache(config, 4, 512, BF16, torch.device("cuda"))
        span = Span(torch.arange(4, device="cuda"), empty(I64, 4), tokens)
        cache.use(span, previous=empty(I64, 1, 4 * tokens))
        assert step(empty(I64, 1, 4 * tokens)).shape == (1, 4 * tokens, config.vocab_size)
    assert names() >= {"_decode_split_kernel", "_decode_combine_kernel"}
    assert ("_decode_linear_kernel" in names()) == (tokens == 1)


LOSSES_AND_PRODUCTS = {
    "logits": (lambda x, t: cross_entropy(x, t, 15.0), (BF16, 4096, 32768), (I64, 4096)),
    "head": (linear_cross_entropy, (BF16, 4096, 1536), (F32, 32768, 1536), (I64, 4096)),
    "fp8": (linear_relu2_fp8, (BF16, 4096, 1536), (F32, 6144, 1536), (F32, 1536, 6144)),
    "weighted norm": (rms_norm, (BF16, 4096, 1536), (F32, 1536)),
}


@pytest.mark.parametrize("name", LOSSES_AND_PRODUCTS)
def test_losses_and_products_compile(name):
    function, *tensors = LOSSES_AND_PRODUCTS[name]
    given = [empty(dtype, *shape, grad=dtype.is_floating_point) for dtype, *shape in tensors]
    torch.compile(function, dynamic=False)(*given).sum().backward()
    assert codegen.GENERATED


def test_a_product_by_descriptors_compiles(monkeypatch):
    def pick(table, size, device):
        return next(tile for tile in fitting_tiles(table, size, device) if tile.kernel)

    monkeypatch.setattr(linear_relu2, "pick_tile", pick)
    given = [empty(BF16, 4096, 1536, grad=True), empty(F32, 6144, 1536), empty(F32, 1536, 6144)]
    torch.compile(linear_relu2.linear_relu2, dynamic=False)(*given).sum().backward()
    assert "_linear_relu2_tma_kernel" in names()


def test_a_size_that_changes_is_compiled_once():
    """Of a graph with symbolic sizes."""
    function = torch.compile(lambda x: rms_norm(x.sin()), dynamic=True)
    for rows in (100, 333):
        function(empty(BF16, rows, 768, grad=True)).sum().backward()
    assert len(codegen.GENERATED) == 2  # forward and backward

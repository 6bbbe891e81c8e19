"""A model spread over ranks: recomputed activations, torch.compile and FSDP2, put around a finished GPT.

The order is fixed: recompute -> compile -> shard, block by block; then memory, and the weights, of which
every rank draws each one whole and keeps its rows, so that any number of ranks starts from the same model.
A rank that is alone has nothing to shard: FSDP2 would copy and cast all parameters and gradients for it.

Matrices of the blocks are gathered in the dtype that the model computes in. Embeddings, head and scalars stay
float32, so that the gradients of frequent tokens are not sums of bfloat16. Gradients are summed in float32.
"""

from __future__ import annotations

import functools
import os
import shutil
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)  # fmt: skip

from hotlap.common.log import log
from hotlap.kernels.dispatch import fast_dtype
from hotlap.kernels.fp8 import check_fp8
from hotlap.model.gpt import GPT
from hotlap.train.distributed.world import World

Recompute = Literal["none", "block", "selective"]
Dtype = Literal["auto", "float32", "bfloat16", "fp8"]
MOST_GRAPHS = 64  # of the function of a block
COMPILE_PAYS = 2000  # steps from which compiling for a CPU surely earns its time back


def parallelize(model: GPT, world: World, recompute: Recompute, compile: bool) -> None:
    """Prepare a model on the meta device, in place, for training on all ranks; it has no memory yet."""
    if compile:  # layers x stages x (training, validation): beyond the limit, blocks would run as they are
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        if recompute != "none":
            block.forward = recomputed(block.forward, recompute == "selective")
        if compile:
            block.forward = torch.compile(block.forward, dynamic=False)
    if world.size > 1:
        shard(model, mesh_of(world))


def mesh_of(world: World) -> DeviceMesh:
    """The ranks of one node, or (replicate, shard) of several nodes: each node holds the whole model.

    So what every layer gathers stays within a node, and only gradients go between nodes.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    nodes = world.size // local
    if nodes > 1 and nodes * local == world.size and local > 1:
        return init_device_mesh(world.device.type, (nodes, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """FSDP2, a block at a time. The last block is needed again at once, so it stays whole."""
    low = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for i, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=i < len(model.blocks) - 1)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for table in model.value_embeddings.values():
        fully_shard(table, mesh=mesh, mp_policy=exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for module in sharded_modules(model):  # the loop divides by the weight of the whole step
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: GPT) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def materialize(model: GPT, device: torch.device, seed: int) -> None:
    """Memory and first weights for a model on the meta device, sharded or not.

    Every rank draws each parameter whole and keeps its rows, so that the numbers are the same whatever the
    number of ranks, at the memory of one whole parameter.
    """
    model.to_empty(device=device)
    model.init_weights(seed, write=keep_rows)


def keep_rows(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole value into a parameter, or this rank's rows of it where the parameter is sharded."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        rows = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter, whole = parameter.to_local(), rows.to_local()
    parameter.copy_(whole)


def recomputed(forward, selective: bool):
    """forward, whose activations are computed again for the backward pass; where selective, products and
    attention are kept.
    """
    options = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products)
    return functools.partial(checkpoint, forward, use_reentrant=False, **options)


KEPT = ("mm", "bmm", "addmm", "_scaled_mm", "attention", "attention_blockwise", "linear_relu2")  # operations


def keep_products(ctx, operation, *args, **kwargs) -> CheckpointPolicy:
    """Keep what takes long to compute, and compute the rest again."""
    name = operation.name().split("::")[-1].split(".")[0]
    kept = name in KEPT or "dot_product" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compiles(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to compile: where it is asked for or pays, and can be done."""
    if choice == "off" or (choice == "auto" and device.type == "cpu" and steps < COMPILE_PAYS):
        return False
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        log.info("no C++ compiler found: running without torch.compile")
        return False
    return True


def accumulate(model: GPT, i: int, count: int) -> None:
    """Before micro-batch i of count: parameters are gathered for the first alone, and gradients are summed
    over ranks after the last alone.
    """
    if not isinstance(model, FSDPModule):
        return
    last = i == count - 1
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    if count > 1:
        model.set_reshard_after_forward(False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; of another, all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicas(model: GPT) -> int:
    """How many ranks hold the same rows of each parameter."""
    mesh = getattr(model.head.weight, "device_mesh", None)
    return mesh.size(0) if mesh is not None and mesh.ndim == 2 else 1


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of everything but fp8's products; a ValueError for fp8 on a device without."""
    if choice == "fp8":
        check_fp8(device)
        return torch.bfloat16
    return fast_dtype(device.type) if choice == "auto" else getattr(torch, choice)


def use_fp8(model: GPT, dtype: str) -> None:
    """Train in fp8 what is large enough for it, where it is asked for."""
    if dtype == "fp8" and not model.use_fp8():
        log.warning("fp8: no layer is large enough for it to pay; computing in bfloat16")

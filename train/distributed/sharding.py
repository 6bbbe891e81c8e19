"""Activation checkpointing, torch.compile and FSDP2, applied to a finished model.

The order matters: each block is checkpointed, then compiled, then sharded. Then memory is allocated and
weights are initialised: each rank generates every parameter whole and keeps its rows, so that any number of
ranks starts from the same model. A single rank is not sharded: FSDP2 would only copy and cast parameters.

Block matrices are gathered in the compute dtype. Embeddings, head and scalars stay float32, so that the
gradients of frequent tokens are not summed in bfloat16. Gradients are reduced in float32.
"""

from __future__ import annotations

import functools
import os
import shutil

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
from hotlap.model.transformer import Embedding, Transformer
from hotlap.train.config import Recompute
from hotlap.train.distributed.world import World

MAX_GRAPHS = 64  # compiled variants of a block's forward


def parallelize(model: Transformer, world: World, recompute: Recompute, compile: bool) -> None:
    """Prepare a model on the meta device for training on all ranks, in place."""
    if compile:  # layers x stages x (training, validation): beyond the limit, blocks would run uncompiled
        torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        if recompute != "none":
            block.forward = recomputed(block.forward, recompute == "selective")
        if compile:
            block.forward = torch.compile(block.forward, dynamic=False)
    if world.size > 1:
        shard(model, mesh_of(world))
    else:
        for table in (m for m in model.modules() if isinstance(m, Embedding)):
            table.accumulate = True


def mesh_of(world: World) -> DeviceMesh:
    """("shard",) on one node; ("replicate", "shard") on several, so that each node holds the whole model.

    All-gathers then stay within a node, and only gradients cross nodes (hybrid sharding).
    """
    if (shards := shard_count(world)) < world.size:
        nodes = world.size // shards
        return init_device_mesh(world.device.type, (nodes, shards), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))


def shard_count(world: World) -> int:
    """Ranks among which the model is divided: those of a node, or all of them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return local if local > 1 and world.size % local == 0 else world.size


def shard(model: Transformer, mesh: DeviceMesh) -> None:
    """Apply FSDP2 block by block. The last block stays gathered, because backward needs it first."""
    low = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for i, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=i < len(model.blocks) - 1)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    tables = [m for m in model.modules() if isinstance(m, Embedding) and m is not model.embedding]
    for table in tables:
        fully_shard(table, mesh=mesh, mp_policy=exact)
        table.set_unshard_in_backward(False)  # its gradient does not depend on its weight
    fully_shard(model, mesh=mesh, mp_policy=exact)
    for module in sharded_modules(model):  # take_step divides by the weight of the whole step
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: Transformer) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def materialize(model: Transformer, device: torch.device, seed: int) -> None:
    """Allocate and initialise a model on the meta device, sharded or not.

    Each rank generates one whole parameter at a time and keeps its rows, so that the weights do not depend on
    the number of ranks.
    """
    model.to_empty(device=device)
    model.init_weights(seed, write=write_rows)


def write_rows(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole value into a parameter; if it is sharded, only this rank's rows."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        rows = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter, whole = parameter.to_local(), rows.to_local()
    parameter.copy_(whole)


def recomputed(forward, selective: bool):
    """forward with activation checkpointing. selective: save the outputs of matmuls and attention."""
    options = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, save_matmuls)
    return functools.partial(checkpoint, forward, use_reentrant=False, **options)


SAVED_OPS = (
    "mm", "bmm", "addmm", "_scaled_mm", "linear_relu2", "linear_relu2_c",
    "attention", "attention_special", "attention_blockwise",
)  # fmt: skip


def save_matmuls(ctx, operation, *args, **kwargs) -> CheckpointPolicy:
    """Save the results of expensive operations, and recompute the rest."""
    name = operation.name().split("::")[-1].split(".")[0]
    saved = name in SAVED_OPS or "dot_product" in name
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def should_compile(choice: str, device: torch.device) -> bool:
    """Whether to compile: if requested or on a GPU, and if there is a C++ compiler."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        log.info("running without torch.compile: no C++ compiler found")
        return False
    return True


def set_gradient_sync(model: Transformer, i: int, count: int) -> None:
    """Call before micro-batch i of count: gather parameters only for the first, and reduce gradients only
    after the last.
    """
    if not isinstance(model, FSDPModule):
        return
    last = i == count - 1
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    if count > 1:
        model.set_reshard_after_forward(False)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replica_count(model: Transformer) -> int:
    """How many ranks hold the same shard of each parameter."""
    mesh = getattr(model.head.weight, "device_mesh", None)
    return mesh.size(0) if mesh is not None and mesh.ndim == 2 else 1


def compute_dtype(choice: str, world: World, width: int) -> torch.dtype:
    """The dtype of everything but fp8 matmuls, for a model of this width; all ranks get the same one.
    Raises ValueError for fp8 on a device without it.
    """
    if choice == "fp8":
        check_fp8(world.device)
        return torch.bfloat16
    if choice == "auto":  # rank 0 decides, for CPUs measure
        kind = world.device.type
        return world.together(lambda: fast_dtype(kind, width) if world.is_main else None)[0]
    return getattr(torch, choice)


def use_fp8(model: Transformer, dtype: str) -> None:
    """If dtype is fp8, use fp8 in the layers that are large enough to benefit."""
    if dtype == "fp8" and not model.use_fp8():
        log.warning("fp8: no layer is large enough to benefit; computing in bfloat16")

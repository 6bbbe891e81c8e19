"""A sharded model trains like a whole one."""

import numpy as np
import pytest
import torch
from helpers.rank_functions import gathers, gradients_that_autograd_sees, small_gpt, train_steps, whole
from helpers.ranks import in_world, run_ranks
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from hotlap.kernels.dispatch import INTERPRETED, register_operations
from hotlap.model.gpt import GPT
from hotlap.train.distributed.sharding import materialize, parallelize, save_matmuls
from hotlap.train.distributed.world import joined

NODES_OF_TWO = {"LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, in_world, train_steps, "float32")[0]


@pytest.mark.parametrize("size, env", [(2, {}), (3, {}), (4, {}), (4, NODES_OF_TWO)])
def test_any_number_of_ranks_has_the_same_losses(alone, size, env):
    for found in run_ranks(size, in_world, train_steps, "float32", env=env):
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)


@pytest.mark.parametrize("recompute, compile", [("block", False), ("selective", False), ("selective", True)])
def test_recomputing_and_compiling_change_no_loss(alone, recompute, compile):
    # compilers take their time on a busy machine
    found = run_ranks(1, in_world, train_steps, "float32", recompute, compile, timeout=240)[0]
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)


@pytest.mark.parametrize("form", ["attention", "attention_special", "attention_blockwise"])
def test_selective_recompute_repeats_no_form_of_attention(form):
    register_operations()
    operation = getattr(torch.ops.hotlap, form).default
    assert save_matmuls(None, operation) == CheckpointPolicy.MUST_SAVE


def test_backward_gathers_all_blocks_but_the_last_again_and_no_table():
    layers, tables = 3, 2
    assert run_ranks(2, in_world, gathers)[0] == (layers + tables + 1, layers - 1)


@pytest.mark.skipif(not INTERPRETED, reason="runs kernels on the CPU")
def test_the_kernels_of_a_model_that_is_not_sharded_add_micro_batches_in_place():
    (seen,) = run_ranks(1, in_world, gradients_that_autograd_sees, env={"HOTLAP_KERNELS": "triton"})
    assert seen == [True, False, False]


def test_bfloat16_trains_to_about_the_same_loss(alone):
    found = run_ranks(2, in_world, train_steps, "bfloat16")[0]
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=0.01)
    assert found["losses"] != alone["losses"]


def test_a_sharded_model_starts_from_the_weights_of_a_whole_one():
    with joined() as world:
        model = small_gpt("float32")
        parallelize(model, world, "none", compile=False)
        materialize(model, world.device, seed=3)
        expected = GPT(model.config).init_weights(3).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(whole(tensor), expected[name]), name


def test_recompute_saves_memory_and_selective_recompute_repeats_no_matmul():
    def measured(recompute: str) -> tuple[int, int]:
        """Elements that autograd saves, and FLOPs of all matmuls."""
        kept = []
        with joined() as world:
            model = small_gpt("float32")
            parallelize(model, world, recompute, compile=False)
            materialize(model, world.device, seed=3)
            ids = torch.zeros(2, 16, dtype=torch.int64)
            keep = torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.numel()) or t, lambda t: t
            )
            with FlopCounterMode(display=False) as flops:
                with keep:
                    loss = model(ids, ids)
                loss.backward()
        return sum(kept), flops.get_total_flops()

    (none, least), (block, most), (selective, same) = map(measured, ("none", "block", "selective"))
    assert block < 0.5 * none and selective < 0.5 * none
    assert least == same < most

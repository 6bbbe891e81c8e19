"""Any number of ranks loads the same state from a checkpoint."""

import pytest
from helpers.checkpoints import load_newest, saved
from helpers.ranks import in_world, run_ranks


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run saved by 2 ranks, and the hash of each whole tensor."""
    run = tmp_path_factory.mktemp("by-two")
    return run, saved(run, 3, size=2)[3]


@pytest.mark.parametrize("mesh", [(), (2,), (3,), (4,), (2, 2)], ids=str)
def test_any_number_of_ranks_loads_a_checkpoint_of_two_bit_for_bit(by_two, mesh):
    run, held = by_two
    size = mesh[0] * mesh[-1] if len(mesh) > 1 else sum(mesh) or 1
    assert run_ranks(size, in_world, load_newest, run, mesh) == [(3, held)] * size


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_one_rank_loads_a_checkpoint_of_uneven_shards_or_replicas(tmp_path, mesh):
    size = 3 if mesh == (3,) else 4
    held = saved(tmp_path, 3, size=size, mesh=mesh)[3]
    assert run_ranks(1, in_world, load_newest, tmp_path) == [(3, held)]

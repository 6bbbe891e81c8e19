"""Ranks join, exchange values, and report which of them failed."""

import pytest
from helpers.rank_functions import agree, fail_at, waits
from helpers.ranks import Failed, in_world, run_ranks

from hotlap.train.distributed.world import joined


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_gets_the_sums_and_all_values(size):
    for total, gathered in run_ranks(size, in_world, agree):
        assert total == [size * (size - 1) / 2, size]
        assert gathered == [{"rank": rank} for rank in range(size)]


def test_a_process_without_torchrun_is_a_group_of_one_and_leaves_it():
    for _ in range(2):
        with joined() as world:
            assert (world.rank, world.size, world.is_main) == (0, 1, True)
            with joined() as inner:
                assert inner is world


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_report_the_error_of_the_rank_that_failed(rank):
    with pytest.raises(Failed) as failure:
        run_ranks(3, in_world, fail_at, env={"FAULT": f"step:{rank}:1:raise"})
    lines = last_lines(failure.value)
    assert set(lines) == {0, 1, 2} and failure.value.seconds < 10
    assert lines.pop(rank) == "ValueError: injected at step, step 1"
    assert all(f"RankLost: rank {rank}: injected at step" in line for line in lines.values())


@pytest.mark.parametrize("action, timeout", [("sigkill", 60), ("sigstop", 2)])
def test_other_ranks_name_a_lost_rank(action, timeout):
    with pytest.raises(Failed) as failure:
        run_ranks(3, waits, timeout, env={"FAULT": f"step:1:1:{action}"})
    lines = last_lines(failure.value)
    assert "killed by signal 9" in lines[1] or "did not end" in lines[1]
    assert all("RankLost: rank 1 does not answer" in lines[rank] for rank in (0, 2))


def last_lines(failure: Failed) -> dict[int, str]:
    return {rank: text.rstrip().splitlines()[-1] for rank, text in failure.texts.items()}

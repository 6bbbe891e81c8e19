"""No more threads than the work is worth."""

import pytest
import torch

from hotlap.kernels.cpu.threads import THREAD_FLOPS, threads_for


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("worth", "threads"), [(0, 1), (0.5, 1), (1.5, 1), (2.5, 2), (4, 4), (1000, 4)])
def test_each_thread_has_its_share_and_there_is_at_least_one(worth, threads):
    with threads_for(worth * THREAD_FLOPS):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


def test_all_threads_are_there_again_after_an_error():
    with pytest.raises(KeyError), threads_for(0):
        raise KeyError
    assert torch.get_num_threads() == 4

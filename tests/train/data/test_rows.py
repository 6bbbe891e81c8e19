"""Packing and batches."""

import threading

import numpy as np
import pytest
import torch
from helpers.small_runs import random_shards, same

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.train.data.rows import PackedRows, pack, prefetch, step_batches, validation_batches
from hotlap.train.data.shards import Documents

SHARDS = [[7, 1, 40, 3, 1, 16, 17], [100], [1, 2, 3, 5, 8, 13, 21], [2]]  # documents' lengths


def test_packing_loses_nothing_and_overfills_no_row():
    lengths = np.random.default_rng(1).lognormal(4.5, 1.2, 3000).astype(int).clip(1, 512)
    rows = pack(lengths, 512)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    fill = np.array([lengths[row].sum() for row in rows])
    assert fill.max() <= 512 and fill.sum() / (512 * len(rows)) >= 0.97


def test_packing_takes_the_row_with_the_least_space():
    assert pack(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_in_an_epoch_each_token_but_a_shard_s_first_is_a_target_once(shuffle, epoch):
    rows = random_shards(SHARDS, T=16, seed=3, shuffle=shuffle)
    first = sum(rows.epoch_rows(e) for e in range(epoch))
    batch = rows.batch(first, rows.epoch_rows(epoch))
    sizes = [sum(shard) for shard in SHARDS]
    opening = set(np.cumsum([0, *sizes[:-1]]).tolist())
    expected = [token for token in range(sum(sizes)) if token not in opening]
    assert sorted(batch.targets[batch.targets != IGNORE].tolist()) == expected


def test_a_target_is_the_next_token_and_documents_start_where_they_start():
    T, lengths = 16, SHARDS[0] + SHARDS[2]
    rows = random_shards([lengths], T)
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())

    def long_piece(token: int) -> bool:
        """Whether a document of more than T tokens is cut before this token."""
        start = max(s for s in starts if s <= token)
        return token > start and (token - start) % T == 0

    batch = rows.batch(0, rows.epoch_rows())
    for inputs, targets, begins in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.document_start.tolist(), strict=True
    ):
        for t in range(T):
            if targets[t] == IGNORE:
                assert begins[t] <= t and all(x == IGNORE for x in targets[t:])  # padding comes last
                assert begins[t] == targets.index(IGNORE)
                continue
            assert targets[t] == inputs[t] + 1
            assert begins[t] in (t, begins[t - 1] if t else 0)
            if t and begins[t] != t:  # goes on with the token's own document
                assert inputs[t] == inputs[t - 1] + 1 and inputs[t] not in starts
            elif (
                t and inputs[t] == inputs[t - 1] + 1
            ):  # a new piece that happens to lie beside the one before
                assert inputs[t] in starts or long_piece(inputs[t])


def test_later_epochs_cut_long_documents_elsewhere():
    rows = random_shards([[1000]], 16)
    beginnings = [
        {int(token) for token in rows.batch(epoch * 63, 62).inputs[:, 0] % 16} for epoch in range(4)
    ]
    assert beginnings[0] == {0} and any(len(b - {0}) for b in beginnings[1:])


def test_the_same_seed_gives_the_same_rows_and_others_give_others():
    rows, again, other = (random_shards(SHARDS, 16, seed) for seed in (5, 5, 6))
    n = rows.epoch_rows()
    assert same(rows.batch(0, 2 * n), again.batch(0, 2 * n))
    assert not same(rows.batch(0, n), other.batch(0, n))
    assert not same(rows.batch(0, n), rows.batch(n, n))


def test_rows_are_the_same_in_whatever_order_they_are_asked_for():
    rows, again = random_shards(SHARDS, 16), random_shards(SHARDS, 16)
    ahead = [rows.batch(i, 1) for i in range(40)]
    assert all(same(again.batch(i, 1), ahead[i]) for i in reversed(range(40)))


@pytest.mark.parametrize(("world", "micro_rows"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(world, micro_rows):
    whole = random_shards(SHARDS, 16)
    ranks = [
        step_batches(random_shards(SHARDS, 16), batch_rows=8, micro_rows=micro_rows, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in range(5):
        micro = [next(rank) for rank in ranks]
        assert all(len(m) == 8 // world // micro_rows for m in micro)
        inputs = torch.cat([m[i].inputs for i in range(len(micro[0])) for m in micro])
        assert torch.equal(inputs, whole.batch(step * 8, 8).inputs)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_resuming_at_a_step_goes_on_with_its_batches(step):
    straight = step_batches(random_shards(SHARDS, 16), batch_rows=8, micro_rows=4)
    for _ in range(step):
        next(straight)
    resumed = step_batches(random_shards(SHARDS, 16), batch_rows=8, micro_rows=4, start=step, first=8 * step)
    for _ in range(4):
        assert all(same(a, b) for a, b in zip(next(straight), next(resumed), strict=True))


def growing(step: int) -> float:
    return (0.25, 0.5, 1.0)[min(step // 2, 2)]


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_steps_that_grow_go_on_where_the_ones_before_ended(start):
    whole = random_shards(SHARDS, 16)
    first = [0, 2, 4, 8, 12, 20, 28]
    ranks = [
        step_batches(random_shards(SHARDS, 16), batch_rows=8, micro_rows=1, start=start, first=first[start],
                     rank=rank, world=2, share=growing) for rank in range(2)
    ]  # fmt: skip
    for step in range(start, 6):
        micro = [next(rank) for rank in ranks]
        inputs = torch.cat([m[i].inputs for i in range(len(micro[0])) for m in micro])
        assert torch.equal(inputs, whole.batch(first[step], first[step + 1] - first[step]).inputs)


def test_what_nobody_said_carries_no_loss():
    tokens, said = np.arange(9), np.array([0, 0, 1, 1, 0, 1, 0, 1, 0], bool)
    rows = PackedRows([lambda: Documents(tokens, np.array([0, 4]), said)], 8, seed=0)
    batch = rows.batch(0, 1)
    assert sorted(batch.targets[batch.targets != IGNORE].tolist()) == [2, 3, 5, 7]
    assert batch.weight == 4


@pytest.mark.parametrize("rows_at_once", [1, 3, 64])
def test_validation_sees_each_target_once(rows_at_once):
    rows = random_shards(SHARDS, 16, shuffle=False)
    targets = torch.cat([b.targets.flatten() for b in validation_batches(rows, rows_at_once)])
    assert (targets[targets != IGNORE]).unique().numel() == (targets != IGNORE).sum()
    assert (targets != IGNORE).sum() == sum(map(sum, SHARDS)) - len(SHARDS)


def test_a_batch_that_does_not_divide_lists_what_does():
    rows = random_shards(SHARDS, 16)
    with pytest.raises(ValueError, match=r"12 rows .* 2 ranks x 5 rows; micro_batch may be 1, 2, 3, 6$"):
        next(step_batches(rows, batch_rows=12, micro_rows=5, world=2))
    with pytest.raises(ValueError, match="make batch_rows a multiple of 3"):
        next(step_batches(rows, batch_rows=8, micro_rows=1, world=3))


def test_a_shard_without_a_target_is_refused():
    with pytest.raises(DataError, match="at least two"):
        random_shards([[1]], 16).batch(0, 1)
    with pytest.raises(ValueError, match="hotlap data"):
        PackedRows([], 16, 0)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_gives_every_item_and_then_its_error():
    def items():
        yield from range(5)
        raise DataError("the sixth is damaged")

    got = []
    with pytest.raises(DataError, match="the sixth"):
        for item in prefetch(items()):
            got.append(item)
    assert got == [0, 1, 2, 3, 4] and not prefetch_threads()


def test_closing_prefetch_ends_its_thread():
    endless = prefetch(iter(int, 1))
    next(endless)
    assert prefetch_threads()
    endless.close()
    assert not prefetch_threads()
    assert list(prefetch(iter(range(7)))) == list(range(7))

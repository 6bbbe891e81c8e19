"""Distributed Muon: owners of matrices, and what ranks send."""

import numpy as np
import pytest
import torch
from helpers.rank_functions import muon_steps
from helpers.ranks import in_world, run_ranks

from hotlap.train.optim.exchange import assign_owners, chunk_rows

NODES_OF_TWO = {"LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("rows, parts", [(8, 2), (7, 3), (3, 4), (1, 4), (10, 4)])
def test_rows_are_chunked_as_torch_does(rows, parts):
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(parts)]
    assert chunk_rows(rows, parts) == chunks + [0] * (parts - len(chunks))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_matrix_has_one_owner_and_the_work_is_balanced(ranks):
    groups = [(12, 2304, 768), (12, 768, 768), (12, 3072, 768), (12, 768, 3072), (6, 6, 12)]
    owners = assign_owners(groups, ranks)
    assert [len(owned) for owned in owners] == [G for G, _, _ in groups]
    busy = np.zeros(ranks)
    for (_, M, N), owned in zip(groups, owners, strict=True):
        np.add.at(busy, owned, min(M, N) ** 2 * max(M, N))
    assert busy.max() - busy.min() <= 3072 * 768**2


@pytest.mark.parametrize("size, env", [(2, {}), (3, {}), (4, {}), (4, NODES_OF_TWO)])
def test_any_number_of_ranks_takes_the_same_step_without_duplicate_work(size, env):
    alone = run_ranks(1, in_world, muon_steps)[0]
    ranks = run_ranks(size, in_world, muon_steps, env=env)
    for found in ranks:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(found["weights"][name], weight, rtol=1e-6, atol=1e-6, err_msg=name)
    assert sum(found["orthogonalized"] for found in ranks) == alone["orthogonalized"]
    # each way, a row is sent unless its rank owns the matrix; the squares are sent with it; replicas get all
    assert sum(found["moved"] for found in ranks) == sum(found["least"] for found in ranks)

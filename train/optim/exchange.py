"""Distributed Muon: matrices are sharded by rows, and each is orthogonalised by one rank, its owner.

Ranks send their rows of a matrix to its owner and receive their rows of the result, in one all-to-all each
way per group of matrices of one shape. Owners are balanced over ranks by cost. With hybrid sharding, one
replica owns the matrix and sends the result to the other replicas in a second all-to-all.
"""
# G matrices of one shape, M rows, N columns, m rows of them on this rank

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def chunk_rows(rows: int, parts: int) -> list[int]:
    """Rows of each shard under FSDP2, which splits like torch.chunk: the last shards may be smaller."""
    size = -(-rows // parts)
    return [max(0, min(size, rows - part * size)) for part in range(parts)]


def assign_owners(groups: Sequence[tuple[int, int, int]], ranks: int) -> list[list[int]]:
    """The owner of each matrix of each group (G, M, N): costliest first, to the least busy rank."""
    cost = [min(M, N) ** 2 * max(M, N) for _, M, N in groups]
    busy = [0] * ranks
    owners: list[list[int]] = [[] for _ in groups]
    for group in sorted(range(len(groups)), key=lambda g: -cost[g]):
        for _ in range(groups[group][0]):
            rank = busy.index(min(busy))
            busy[rank] += cost[group]
            owners[group].append(rank)
    return owners


class Exchange:
    """Sends one group's matrices of shape (M, N) to their owners and back.

    owners: each matrix's rank, in the row-major order of the mesh. `moved`: bytes sent to other ranks.
    """

    def __init__(self, shape: tuple[int, int], owners: list[int], mesh: DeviceMesh):
        self.shape, self.owners, self.mesh = shape, owners, mesh
        self.last = mesh.ndim - 1  # the mesh dimension that rows are sharded over
        self.shard, shards = mesh.get_local_rank(self.last), mesh.size(self.last)
        replica, replicas = (mesh.get_local_rank(0), mesh.size(0)) if self.last else (0, 1)
        self.rows = chunk_rows(shape[0], shards)  # of a matrix, on each rank of a replica
        self.first_row = sum(self.rows[: self.shard])
        owned = [[self._owned(r * shards + shard) for shard in range(shards)] for r in range(replicas)]
        self.owned = owned[replica]
        self.counts = [sum(map(len, part)) for part in owned]  # matrices that each replica owns
        self._order = self._index(matrix for part in self.owned for matrix in part)
        self._places = self._index(m for part in owned for some in part for m in some).argsort()
        self.moved = 0

    def _owned(self, rank: int) -> list[int]:
        return [matrix for matrix, owner in enumerate(self.owners) if owner == rank]

    def _index(self, matrices: Iterable[int]) -> Tensor:
        """On the device, and made once: a GPU would be waited for while a list is copied to it."""
        return torch.tensor(list(matrices), dtype=torch.int64, device=self.mesh.device_type)

    def _all_to_all(
        self, inputs: Tensor, splits: list[int], sizes: list[int], dimension: int
    ) -> tuple[Tensor, dist.Work]:
        """Send inputs, split in these sizes, to the ranks of a mesh dimension; receive parts of the other
        sizes. Both are flat.
        """
        output = inputs.new_empty(sum(sizes))
        here = self.mesh.get_local_rank(dimension)
        self.moved += (inputs.numel() - splits[here]) * inputs.element_size()
        work = dist.all_to_all_single(
            output, inputs, sizes, splits, group=self.mesh.get_group(dimension), async_op=True
        )
        return output, work

    def send(self, update: Tensor) -> None:
        """Start sending this rank's rows, update (G, m, N), to the owners."""
        _, m, N = update.shape
        splits = [len(owned) * m * N for owned in self.owned]
        sizes = [len(self.owned[self.shard]) * rows * N for rows in self.rows]
        self._pending = self._all_to_all(update[self._order].reshape(-1), splits, sizes, self.last), sizes

    def receive(self) -> Tensor:
        """Receive the whole matrices that this rank owns: (k, M, N)."""
        (flat, work), sizes = self._pending
        work.wait()
        k, N = len(self.owned[self.shard]), self.shape[1]
        parts = zip(flat.split(sizes), self.rows, strict=True)
        return torch.cat([part.view(k, rows, N) for part, rows in parts], 1)

    def send_back(self, update: Tensor, squares: Tensor) -> None:
        """Start sending the rows of the owned matrices (k, M, N) back to their ranks, each matrix with its
        squares (L float32 numbers).
        """
        tail = squares.flatten(1).contiguous().view(update.dtype)
        parts = [
            torch.cat([rows.flatten(1), tail], 1).view(-1) for rows in update.split(self.rows, 1)
        ]  # each k (m N + the squares)
        width = self.rows[self.shard] * self.shape[1] + tail.shape[1]
        sizes = [len(owned) * width for owned in self.owned]
        self._pending = self._all_to_all(torch.cat(parts), list(map(len, parts)), sizes, self.last), sizes
        self._width = width

    def receive_back(self) -> tuple[Tensor, Tensor]:
        """Receive this rank's rows (G, m, N) of all orthogonalised matrices, and their squares (G, L)."""
        (flat, work), _ = self._pending
        work.wait()
        if self.last:  # and those that other replicas own
            replicas, sizes = len(self.counts), [count * self._width for count in self.counts]
            flat, work = self._all_to_all(flat.repeat(replicas), [len(flat)] * replicas, sizes, 0)
            work.wait()
        found = flat.view(len(self.owners), self._width)[self._places]
        m, N = self.rows[self.shard], self.shape[1]
        return found[:, : m * N].view(len(found), m, N), found[:, m * N :].contiguous().view(torch.float32)

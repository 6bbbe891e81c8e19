"""The processes of a run: torchrun's, or one alone, which is a group of one. What they decide together.

Gloo carries the few numbers that the CPUs agree on, NCCL the tensors of GPUs. On one node everything stays on
the loopback interface, because torch.distributed trusts whoever connects.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from hotlap.common.errors import DataError, RankLost
from hotlap.common.log import log
from hotlap.kernels.dispatch import default_device

T = TypeVar("T")
PREPARATION = timedelta(hours=12)  # what one rank may take to download and tokenise while the others wait
ROLL_CALL = 3.0  # seconds in which the ranks that are left notice that one is lost
LOST = re.compile(r"gloo|nccl|connection|timed? ?out|socket|store", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """One process's place among all those of a run. `store` is a dictionary of bytes that they share."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    timeout: float = 300  # seconds that the others wait for a rank

    @property
    def leads(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks of numbers that their CPUs have."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: object, group: dist.ProcessGroup | None = None) -> list:
        """What each rank gave, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value, group)
        return found

    def together(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """What action() returned on each rank. Where it fails on one, that rank raises its error and the
        others what it said: a DataError as such, anything else as RankLost. It must not itself wait for them.
        """
        value = problem = raised = None
        try:
            value = action()
        except Exception as error:
            raised, problem = error, (isinstance(error, DataError), str(error) or type(error).__name__)
        outcomes = self.gather((value, problem), group)
        if raised is not None:
            raise raised
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                bad_data, text = problem
                raise DataError(text) if bad_data else RankLost(f"rank {rank}: {text}")
        return [value for value, _ in outcomes]

    @contextmanager
    def leader_first(self, what: str) -> Iterator[None]:
        """The body runs on rank 0, and once it is done there, on the others. `what` names it, once a run."""
        key = f"done/{what}"
        if not self.leads:
            self.store.wait([key], PREPARATION)
            if problem := self.store.get(key).decode():
                raise RankLost(f"rank 0: {problem}")
            yield
            return
        try:
            yield
        except Exception as error:
            self.store.set(key, str(error) or type(error).__name__)
            raise
        self.store.set(key, "")


_world: World | None = None  # of this process, while it is part of a group


@contextmanager
def joined(timeout: float = 300) -> Iterator[World]:
    """Be one of the run's processes: torchrun's, or one alone. Within another `joined`, the same world.

    timeout: seconds after which a rank that does not answer is lost. Where that, or the failure of another
    rank, shows here as a broken connection, RankLost says which rank it was, and what it said.
    """
    global _world
    if _world is not None:
        yield _world
        return
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    stay_local()
    if "WORLD_SIZE" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("torch", store), rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout), device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    _world = World(rank, size, device, dist.PrefixStore("hotlap", store), timeout)
    speak_as(_world)
    try:
        yield _world
    except Exception as error:
        if size == 1:
            raise
        raise first_error(_world, error) from error
    finally:
        _world = None
        if size == 1 or sys.exc_info()[0] is None:  # a broken group would wait for those that are gone
            dist.destroy_process_group()


def stay_local() -> None:
    """Keep the traffic of processes that are all on this machine on its loopback interface."""
    environment = os.environ
    address = environment.get("MASTER_ADDR", "localhost")
    try:
        loopback = address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        loopback = False
    one_node = environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "")
    names = [name for _, name in socket.if_nameindex()]
    if (loopback or one_node) and "lo" in names:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")


def speak_as(world: World) -> None:
    """Rank 0 speaks for all; what another says is a warning or worse, and carries its number."""
    if world.size > 1 and not world.leads:
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(logging.Formatter(f"rank {world.rank}: %(message)s"))


def first_error(world: World, error: Exception) -> Exception:
    """error itself, where it arose here; else what the first rank said that failed, or which rank is gone."""
    broken = isinstance(error, RuntimeError) and LOST.search(str(error))
    try:
        if not broken:
            if not isinstance(error, RankLost):
                world.store.compare_set("error", "", f"rank {world.rank}: {error or type(error).__name__}")
            return error
        world.store.set(f"alive/{world.rank}", "")
        end = time.monotonic() + ROLL_CALL
        while time.monotonic() < end and not world.store.check(["error"]):
            if missing_ranks(world) == []:
                break
            time.sleep(0.05)
        if world.store.check(["error"]):
            return RankLost(world.store.get("error").decode())
        missing = missing_ranks(world)
    except RuntimeError:  # the store was rank 0's
        return RankLost(
            f"rank 0 was lost, as far as rank {world.rank} can see: it was killed, or its machine failed"
        )
    if not missing:
        return error
    gone = ", ".join(map(str, missing))
    return RankLost(f"rank {gone} does not answer: it was killed or stopped, or its machine failed")


def missing_ranks(world: World) -> list[int]:
    """Ranks that have not answered the roll call."""
    return [rank for rank in range(world.size) if not world.store.check([f"alive/{rank}"])]

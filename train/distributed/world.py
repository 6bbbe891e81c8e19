"""The processes of a run, started by torchrun or a single one, and the operations that they share.

Gloo carries small values between CPUs, NCCL tensors between GPUs. On one node all traffic stays on the
loopback interface, because torch.distributed trusts anyone who connects.
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
from hotlap.common.log import Formatter, log
from hotlap.common.terminal import printable
from hotlap.kernels.dispatch import default_device

T = TypeVar("T")
PREPARATION_TIMEOUT = timedelta(hours=12)  # how long the others wait while rank 0 downloads and tokenises
ROLL_CALL = 3.0  # seconds for the surviving ranks to notice that one is lost
CONNECTION_ERRORS = re.compile(r"gloo|nccl|connection|timed? ?out|socket|store", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """One process of a run. `store` is a key-value store that all of them share."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    timeout: float = 300  # seconds to wait for another rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which does what only one process should do."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum each number over all ranks; collective, on the CPU."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: object, group: dist.ProcessGroup | None = None) -> list:
        """Each rank's value, in rank order; collective."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value, group)
        return found

    def together(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Return what action() returned on each rank; collective, though action must not be.

        If it fails on one rank, that rank raises its error, and the others raise its message as DataError if
        it was one, else as RankLost.
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
    def main_first(self, what: str) -> Iterator[None]:
        """Run the body on rank 0, then on the others. what: a name that is unique within the run."""
        key = printable(f"done/{what}")  # the store takes UTF-8 only
        if not self.is_main:
            self.store.wait([key], PREPARATION_TIMEOUT)
            if problem := self.store.get(key).decode():
                raise RankLost(f"rank 0: {problem}")
            yield
            return
        try:
            yield
        except Exception as error:
            self.store.set(key, printable(str(error)) or type(error).__name__)
            raise
        self.store.set(key, "")


_world: World | None = None  # this process's, while it is part of a group


@contextmanager
def joined(timeout: float = 300) -> Iterator[World]:
    """Join torchrun's process group, or a group of one. A nested `joined` yields the same world.

    timeout: seconds after which a rank that does not answer is considered lost. If another rank is lost or
    fails, and this one only sees a broken connection, RankLost names that rank and gives its error.
    """
    global _world
    if _world is not None:
        yield _world
        return
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    use_loopback()
    if "WORLD_SIZE" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    if size > 1 and device.type == "mps":
        raise ValueError("several processes cannot train on a Mac's GPU; start one, or set HOTLAP_DEVICE=cpu")
    between_gpus = size > 1 and device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if between_gpus else "gloo",
        store=dist.PrefixStore("torch", store), rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout), device_id=device if between_gpus else None,
    )  # fmt: skip
    _world = World(rank, size, device, dist.PrefixStore("hotlap", store), timeout)
    set_log_rank(_world)
    try:
        yield _world
    except Exception as error:
        if size == 1:
            raise
        raise first_error(_world, error) from error
    finally:
        _world = None
        if size == 1 or sys.exc_info()[0] is None:  # destroying a broken group would wait for lost ranks
            dist.destroy_process_group()


def use_loopback() -> None:
    """If all processes are on this machine, keep their traffic on its loopback interface."""
    environment = os.environ
    address = environment.get("MASTER_ADDR", "localhost")
    try:
        loopback = address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        loopback = False
    one_node = environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "")
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # Linux's, macOS's
    if (loopback or one_node) and names:
        environment.setdefault("GLOO_SOCKET_IFNAME", min(names))
        environment.setdefault("NCCL_SOCKET_IFNAME", min(names))


def set_log_rank(world: World) -> None:
    """Log everything on rank 0. Other ranks log only warnings and errors, prefixed with their rank."""
    if world.size > 1 and not world.is_main:
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(Formatter(f"rank {world.rank}: %(message)s"))


def first_error(world: World, error: Exception) -> Exception:
    """error if it arose on this rank; else RankLost with the first failed rank's error or the lost ranks."""
    broken = isinstance(error, RuntimeError) and CONNECTION_ERRORS.search(str(error))
    try:
        if not broken:
            if not isinstance(error, RankLost):
                world.store.compare_set(
                    "error", "", printable(f"rank {world.rank}: {error or type(error).__name__}")
                )
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
    except RuntimeError:  # the store, which lives on rank 0, is gone
        return RankLost(f"rank {world.rank} lost rank 0: it was killed, or its machine failed")
    if not missing:
        return error
    gone = ", ".join(map(str, missing))
    return RankLost(f"rank {gone} does not answer: it was killed or stopped, or its machine failed")


def missing_ranks(world: World) -> list[int]:
    """Ranks that have not answered the roll call yet."""
    return [rank for rank in range(world.size) if not world.store.check([f"alive/{rank}"])]

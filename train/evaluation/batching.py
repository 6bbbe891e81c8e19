"""Work in batches of similar length, divided among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from hotlap.train.distributed.world import World

Item, Answer = TypeVar("Item"), TypeVar("Answer")
BATCH_TOKENS = 16_384  # tokens of a batch, including padding


def by_length(
    items: list[Item], length: Callable[[Item], int], rows: Callable[[Item], int] = lambda item: 1
) -> Iterator[list[Item]]:
    """The items, the shortest first, in batches of at most BATCH_TOKENS when padded to the longest.

    length: tokens of the item's longest row. rows: how many it has; all of them are in the same batch.
    """
    batch: list[Item] = []
    held = 0
    for item in sorted(items, key=length):
        if batch and (held + rows(item)) * length(item) > BATCH_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += rows(item)
    if batch:
        yield batch


def shared(world: World, items: list[Item], answer: Callable[[list[Item]], list[Answer]]) -> list[Answer]:
    """answer(items), in the order of the items, which are divided among the ranks; collective, though
    `answer` must not be. An error on one rank is raised on all (`World.together`).
    """
    found: list = [None] * len(items)
    for rank, part in enumerate(world.together(lambda: answer(items[world.rank :: world.size]))):
        found[rank :: world.size] = part
    return found


def progress(world: World, what: str, total: int, unit: str = "example") -> tqdm:
    """A progress bar of rank 0's share of the work."""
    hidden = None if world.is_main else True
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=hidden, leave=False)


@contextmanager
def failing_as(task: str) -> Iterator[None]:
    """Name the task in the error of a model that is damaged."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{task} has no score: {error}") from error

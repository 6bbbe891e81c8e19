"""What tests run on several ranks."""

from hotlap.train.dist import World, joined
from hotlap.train.faults import fault


def agree(world: World) -> tuple:
    with world.leader_first("a test"):
        pass
    return world.total(world.rank, 1.0), world.gather({"rank": world.rank})


def fail_at(world: World, steps: int = 3) -> None:
    """Steps that all ranks take together, with a fault where FAULT says so."""
    for step in range(steps):
        fault("step", world.rank, step)
        world.total(1.0)


def waits(timeout: float) -> None:
    """As above, among ranks that wait so many seconds for each other."""
    with joined(timeout) as world:
        fail_at(world)

"""Detects stragglers: names ranks that hang or lag, and dumps the stacks of the ranks that wait for them.

Each rank records in the shared store which step it has started. If a step does not end, the others are
waiting for the ranks that have not started it.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time

from hotlap.common.log import log
from hotlap.train.distributed.world import World

HUNG_AFTER = 0.6  # fraction of the group's timeout after which hanging ranks are named
REPORT_EVERY = 50  # steps between checks for lagging ranks
MIN_RATIO, MIN_SHARE = 2.0, 0.05  # lateness that is reported: x the others' median, and share of a step


class Stragglers:
    """One rank's view of the others. Does nothing on a single rank."""

    def __init__(self, world: World):
        self.world, self.step = world, -1
        self.began = self.left = time.monotonic()
        self.late = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stragglers")

    def __enter__(self) -> Stragglers:
        if self.world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def arrive(self, step: int) -> None:
        """Call before a step's first collective operation."""
        self.step, self.began = step, time.monotonic()
        self.late += self.began - self.left
        if self.world.size > 1:
            self.world.store.set(f"step/{self.world.rank}", str(step))

    def leave(self) -> None:
        """Call after a step's last collective operation."""
        self.began = self.left = time.monotonic()

    def report(self, step: int, seconds: float) -> None:
        """Every REPORT_EVERY steps, name ranks that keep the others waiting. seconds: duration of a step."""
        if self.world.size == 1 or (step + 1) % REPORT_EVERY:
            return
        late = [total / REPORT_EVERY for total in self.world.gather(self.late)]
        self.late = 0.0
        for rank, mine in enumerate(late):
            others = statistics.median(late[:rank] + late[rank + 1 :])
            if mine > MIN_RATIO * others and mine - others > MIN_SHARE * seconds and self.world.is_main:
                log.warning(
                    "rank %d is a straggler: it starts each step after %.3f s, the others after %.3f s (%.1f "
                    "times); its data or its machine is slow", rank, mine, others, mine / max(others, 1e-9),
                )  # fmt: skip

    def _watch(self) -> None:
        limit, reported = HUNG_AFTER * self.world.timeout, -1
        while not self._stop.wait(limit / 10):
            if time.monotonic() - self.began < limit or reported == self.step:
                continue
            reported = self.step
            try:
                steps = [self._step_of(rank) for rank in range(self.world.size)]
            except RuntimeError:  # the store is gone, so the run has ended
                return
            behind = [f"rank {rank} (at step {at})" for rank, at in enumerate(steps) if at < max(steps)]
            who = f"waiting for {', '.join(behind)}" if behind else "no rank is behind"
            log.warning(
                "rank %d has waited %.0f s in step %d: %s; its stacks:", self.world.rank, limit, reported, who
            )
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _step_of(self, rank: int) -> int:
        key = f"step/{rank}"
        return int(self.world.store.get(key)) if self.world.store.check([key]) else -1

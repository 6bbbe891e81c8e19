"""Rewards in processes of their own: a function that raises, hangs or returns no number costs its sample, not
the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import NamedTuple

from hotlap.common.log import log
from hotlap.common.process import end_session
from hotlap.train.rewards.worker import START_SECONDS

REWARD_SECONDS = 10.0  # of a call
SPARE = 1.0  # seconds until the parent ends a process whose own alarm did not
GROW = 0.1  # seconds that samples take before more processes are started
MOST_PROCESSES = 8


class Sample(NamedTuple):
    """reward: `package.module:function`. place: of the prompt, for messages."""

    reward: str
    answer: str
    record: dict
    place: str = ""


class Failure(NamedTuple):
    """Why a sample has no reward, on one line."""

    reason: str


class Process:
    """A process that has imported the functions, or is about to (`ready`). sample: the number of the one in
    work; None if it waits for one. deadline: until when it must have replied.
    """

    def __init__(self, rewards: Sequence[str], seconds: float):
        self.pipe, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from hotlap.train.rewards.worker import main\n"
            f"main({theirs.fileno()}, {seconds!r}, {list(rewards)!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that its own processes are ended with it
        )
        theirs.close()
        self.seconds, self.ready, self.sample = seconds, False, None
        self.deadline = time.monotonic() + START_SECONDS + SPARE

    def ask(self, number: int, sample: Sample) -> None:
        self.sample, self.deadline = number, time.monotonic() + self.seconds + SPARE
        with suppress(OSError):  # it has ended, which the reader of its pipe finds
            self.pipe.send((sample.reward, sample.answer, sample.record))

    def reply(self) -> dict | None:
        """What it says; None if it has ended."""
        try:
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """End it, and all that it started."""
        end_session(self.process)
        self.pipe.close()
        self.process.wait()

    def why_ended(self) -> str:
        """Why it ended, or must end: it is overdue, or has closed its pipe, as it does when it ends."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, min(SPARE, self.deadline - time.monotonic())))
        exit_code = self.process.returncode
        if exit_code in (None, -signal.SIGALRM):
            return f"it took longer than {self.seconds:g} s" if self.ready else "it takes too long to import"
        if exit_code < 0:
            return f"its process was ended by {signal.Signals(-exit_code).name}"
        return f"its process ended with exit code {exit_code}"


class Guarded:
    """Calls rewards in processes: one, and more when a step's samples take long, up to `most`.

    ValueError if a reward is no function of an answer and a record. Use it in a `with` statement, or `close`
    it.
    """

    def __init__(self, rewards: Sequence[str], seconds: float = REWARD_SECONDS, most: int | None = None):
        if sys.platform == "win32":
            raise ValueError(
                "rewards run in processes that alarms end, which Windows has not; use Linux or macOS (or WSL)"
            )
        self.rewards, self.seconds = tuple(dict.fromkeys(rewards)), seconds
        self.most = most or min(MOST_PROCESSES, os.cpu_count() or 1)
        self.failures: Counter[str] = Counter()
        """How often each kind of failure has occurred."""
        self.processes = [Process(self.rewards, seconds)]
        try:
            while not self.processes[0].ready:
                self._listen({}, [])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self.processes:
            self.processes.pop().end()

    def score(self, samples: Sequence[Sample]) -> list[float | Failure]:
        """The reward of each sample, or why it has none. The first failure of a kind is logged, then every
        tenth, hundredth, and so on.
        """
        assert self.processes, "closed"
        found: dict[int, float | Failure] = {}
        waiting = deque(range(len(samples)))
        grow_at = time.monotonic() + GROW
        try:
            while len(found) < len(samples):
                for process in self.processes:
                    if waiting and process.ready and process.sample is None:
                        number = waiting.popleft()
                        process.ask(number, samples[number])
                if waiting and time.monotonic() > grow_at:
                    more = min(self.most - len(self.processes), len(waiting))
                    self.processes += [Process(self.rewards, self.seconds) for _ in range(more)]
                self._listen(found, samples)
        except BaseException:  # also Ctrl-C: no process is left behind
            self.close()
            raise
        return [found[number] for number in range(len(samples))]

    def _listen(self, found: dict[int, float | Failure], samples: Sequence[Sample]) -> None:
        """Wait for the processes at work, for a moment, and take what they say."""
        at_work = [p for p in self.processes if not p.ready or p.sample is not None]
        spoken = wait([p.pipe for p in at_work], GROW)
        for process in at_work:
            if process.pipe in spoken or time.monotonic() > process.deadline:
                said = process.reply() if process.pipe in spoken else None
                self._take(process, said, found, samples)

    def _take(
        self,
        process: Process,
        said: dict | None,
        found: dict[int, float | Failure],
        samples: Sequence[Sample],
    ) -> None:
        """Note what a process said, or that it ended or must end (None); then another takes its place."""
        number, process.sample = process.sample, None
        if said is None:
            self.processes.remove(process)
            reason = process.why_ended()
            process.end()
            if not process.ready:
                raise ValueError(f"the reward {', '.join(self.rewards)} cannot be used: {reason}")
            self.processes.append(Process(self.rewards, self.seconds))
            said = {"reason": reason, "kind": reason}
        if not process.ready:
            if "refused" in said:
                raise ValueError(said["refused"])
            process.ready = True
        elif "reward" in said:
            found[number] = said["reward"]
        else:
            found[number] = Failure(said["reason"])
            self._count(said, samples[number])

    def _count(self, said: dict, sample: Sample) -> None:
        kind = f"{sample.reward}: {said['kind']}"
        self.failures[kind] += 1
        times = self.failures[kind]
        if times == 1:
            where = f" {sample.place}" if sample.place else ""
            log.warning(
                "warning: no reward for an answer%s, which is left out: %s: %s",
                where and f" to{where}", sample.reward, said["reason"],
            )  # fmt: skip
        elif set(str(times)[1:]) == {"0"} and str(times)[0] == "1":
            log.warning("warning: %d answers so far without a reward, as %s", times, kind)

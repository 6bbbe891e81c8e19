"""The one training loop, for any iterator of batches and any loss."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hotlap.common.errors import Interrupted
from hotlap.common.log import log
from hotlap.model.flops import mfu, nanochat_flops, peak_flops
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.memory import out_of_memory_explained
from hotlap.train.distributed.stragglers import Stragglers
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.losses import Loss
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule
from hotlap.train.run.checkpoint import Saver, check_space
from hotlap.train.run.metrics import Progress
from hotlap.train.run.profile import profiled
from hotlap.train.run.state import RunState
from hotlap.train.step import Outcome, rehearsed, take_step
from hotlap.train.step_checks import Judge, Policy, check_copies


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run, and how often it stops to look."""

    steps: int
    evaluate_every: int = 250
    """Steps between validations; the last step always validates."""
    save_every: int = 250
    """Steps between checkpoints; the last step always saves."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    bad_steps: Policy = "stop"
    """What becomes of a step with a loss or gradient that is not finite, or jumps: stop at the former and
    report the latter, or skip both.
    """
    minutes: float = 0.0
    """Minutes of training after which the run ends, if it has not by its steps; its schedules follow the
    clock then. Start-up, compilation, validations and saving are not counted. 0 is no limit.
    """

    def validate(self) -> LoopConfig:
        for name in ("steps", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("clip", "minutes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more")
        return self


def fit(
    config: LoopConfig,
    schedule: ScheduleConfig,
    model: GPT,
    optimizer: MuonAdamW,
    tokenizer: Tokenizer,
    batches: Iterator[list[Batch]],
    loss: Loss,
    *,
    world: World,
    run: Path,
    state: RunState | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    profile: bool = False,
    warm_up: bool = False,
) -> dict[str, float]:
    """Train from where `state` is to the end, and return the last metrics.

    batches: for each step from there on, this rank's micro-batches. loss: see losses.py. state: kept in
    checkpoints. warm_up: compile first, on steps that are undone; with `minutes`, always. A SIGINT, SIGTERM
    or SIGUSR1 to any rank saves and raises Interrupted on all.
    """
    state = state or RunState()
    finished = state.finished or state.step == config.steps
    clock, judge = Clock(config), Judge(config.bad_steps, state.recent)
    metrics_of = step_metrics(model, world)
    if world.leads:
        check_space(run, model, optimizer)
    with (
        Saver(run, world) as saver,
        Progress(run, clock.steps, state.step, world) as progress,
        Stragglers(world) as stragglers,
        StopRequest() as stop,
        profiled(run if profile else None, world) as profile_step,
    ):
        if (warm_up or config.minutes) and not finished:
            batches = rehearsed(model, optimizer, schedule, batches, loss, world)
        last = progress.resume(state, evaluate)
        for step in range(state.step, state.step if finished else config.steps):
            began = time.perf_counter()
            micro = [batch.to(world.device) for batch in next(batches)]
            waited = time.perf_counter() - began
            fault("step", world.rank, step)
            stragglers.arrive(step)
            weight, tokens, stopping, seconds = world.total(
                sum(b.weight for b in micro), sum(b.inputs.numel() for b in micro), stop.asked,
                state.seconds if world.leads else 0.0,
            )  # fmt: skip
            share = set_schedule(model, optimizer, schedule, step, clock.over(step, seconds))
            done = clock.last(step, seconds)
            with out_of_memory_explained(world, len(micro[0].inputs)):
                outcome = take_step(model, micro, loss, weight, config.clip, world, step)
                good = judge.approves(world, step, outcome, model, micro)
                if good:
                    optimizer.step()
            optimizer.zero_grad()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            stragglers.leave()
            seconds = time.perf_counter() - began
            state.step, state.finished, state.recent = step + 1, done, judge.recent
            state.seconds, state.tokens = state.seconds + seconds, state.tokens + int(tokens)
            state.skipped += not good
            state.last = metrics_of(state, outcome, share, tokens / seconds, waited)
            stragglers.report(step, seconds)
            profile_step()
            if done or state.step % config.save_every == 0 or stopping:
                check_copies(world, model, optimizer, step)
                saver.save(model, optimizer, tokenizer, state)
            evaluated = {}
            if evaluate and not stopping and (done or state.step % config.evaluate_every == 0):
                if done:
                    saver.finish()  # before anything else can go wrong
                evaluated = evaluate()
                stragglers.leave()
            progress.show(state.last, evaluated, clock.over(state.step, state.seconds))
            last = state.last | evaluated
            if done:
                break
            if stopping:
                saver.finish()
                raise Interrupted(
                    f"stopped after step {state.step} of {clock.steps or 'a timed run'}, saved in {run}; the "
                    "same command with --resume auto goes on (make demo needs no flag)"
                )
    return world.gather(last)[0]  # as rank 0 has measured


def step_metrics(model: GPT, world: World) -> Callable[..., dict[str, float]]:
    """A function that makes the line of metrics.jsonl for a step."""
    flops, peak = nanochat_flops(model), peak_flops(world.device)

    def metrics_of(
        state: RunState, outcome: Outcome, lr_share: float, tokens_per_second: float, waited: float
    ) -> dict[str, float]:
        return {
            "step": state.step - 1,
            "loss": outcome.loss,
            **outcome.metrics,
            "gradient_norm": outcome.norm,
            "lr_share": lr_share,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu(flops, tokens_per_second / world.size, peak),
            "data_wait": waited,
            "skipped": state.skipped,
            "seconds": state.seconds,
            "tokens": state.tokens,
        }

    return metrics_of


class Clock:
    """How much of a run is over: by its steps, or by the seconds of training that rank 0 has counted."""

    def __init__(self, config: LoopConfig):
        self.most, self.limit = config.steps, 60 * config.minutes
        self.steps = None if self.limit else self.most  # where they are known before

    def over(self, step: int, seconds: float) -> float:
        """Share of the run that is over before `step`, after so many seconds of training."""
        share = step / self.most
        return min(1.0, max(share, seconds / self.limit)) if self.limit else share

    def last(self, step: int, seconds: float) -> bool:
        """Whether none comes after `step`, or none that ends within the limit, going by their mean."""
        return step + 1 == self.most or bool(self.limit and step and seconds * (1 + 2 / step) > self.limit)


class StopRequest:
    """While it is open, the first SIGINT, SIGTERM or SIGUSR1 only sets `asked`; a second one does what it
    always did.
    """

    def __enter__(self) -> StopRequest:
        self.asked = False
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if threading.current_thread() is threading.main_thread():  # it alone may set handlers
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        log.info("\nstopping after this step, to save; again to stop at once")
        self.asked = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

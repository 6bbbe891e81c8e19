"""The training loop, for any iterator of batches and any loss."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hotlap.common.errors import Interrupted
from hotlap.common.log import log
from hotlap.model.flops import mfu, nanochat_flops, peak_flops
from hotlap.model.lora import trained_weights
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.train.config import LoopConfig
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.memory import explain_out_of_memory
from hotlap.train.distributed.stragglers import Stragglers
from hotlap.train.distributed.world import World
from hotlap.train.faults import fault
from hotlap.train.losses import Loss
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.optim.schedule import ScheduleConfig, set_schedule
from hotlap.train.passes import Passes
from hotlap.train.run.checkpoint import Saver
from hotlap.train.run.disk_space import checkpoint_bytes, require_space
from hotlap.train.run.metrics import Progress
from hotlap.train.run.profile import profiled
from hotlap.train.run.state import RunState
from hotlap.train.run.trackers import tracked
from hotlap.train.step import Outcome, take_step, take_warmup_steps
from hotlap.train.step_checks import StepChecker, check_copies


def fit(
    config: LoopConfig,
    schedule: ScheduleConfig,
    model: Transformer,
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
    tracker: str = "none",
    warm_up: bool = False,
) -> dict[str, float]:
    """Train from `state` to the end of the run, and return the last metrics.

    batches: this rank's micro-batches of each remaining step. loss: see losses.py. state: what checkpoints
    keep; None starts a new run. warm_up: compile before the clock starts, on steps that are undone; always
    on with `minutes`. On SIGINT, SIGTERM or SIGUSR1 to any rank, all ranks save and raise Interrupted.
    """
    state = state or RunState()
    finished = state.finished or state.step == config.steps
    clock, checker = Clock(config), StepChecker(config.bad_steps, state.recent)
    passes, metrics_of = Passes(model, loss), step_metrics(model, world)
    if world.is_main:
        require_space(run, checkpoint_bytes(trained_weights(model), dict(optimizer.named_state())))
    with (
        Saver(run, world) as saver,
        Progress(run, clock.steps, state.step, world) as progress,
        tracked(tracker if world.is_main else "none", run),
        Stragglers(world) as stragglers,
        StopRequest() as stop,
        profiled(run if profile else None, world) as profile_step,
    ):
        if state.step:  # a new folder needs it to be resumed itself; in the run's own, it exists
            saver.save(model, optimizer, tokenizer, state)
            saver.finish()
        if (warm_up or config.minutes) and not finished:  # after saving: it draws the first of the batches
            batches = take_warmup_steps(passes, optimizer, schedule, batches, world)
        last = progress.resume(state, evaluate)
        if state.step and saver.is_best(last):  # it ended before it could say so
            saver.name_best(state.step, last)
        for step in range(state.step, state.step if finished else config.steps):
            began = time.perf_counter()
            micro = [batch.to(world.device) for batch in next(batches)]
            waited = time.perf_counter() - began
            fault("step", world.rank, step)
            stragglers.arrive(step)
            weight, tokens, stopping, elapsed = world.total(
                sum(b.weight for b in micro), sum(b.inputs.numel() for b in micro), stop.asked,
                state.seconds if world.is_main else 0.0,
            )  # fmt: skip
            share = set_schedule(model, optimizer, schedule, step, clock.fraction(step, elapsed))
            done = clock.is_last(step, elapsed)
            with explain_out_of_memory(world, len(micro[0].inputs)):
                outcome = take_step(passes, micro, weight, config.clip, world, step)
                # a step without a gradient has nothing to teach, and momentum alone would move the weights
                accepted = checker.accepts(world, step, outcome, model, micro) and outcome.norm > 0
                if accepted:
                    optimizer.step()
            optimizer.zero_grad()
            saves = done or stopping or (step + 1) % config.save_every == 0
            evaluates = evaluate and not stopping and (done or (step + 1) % config.evaluate_every == 0)
            # Otherwise the host prepares the next step while a GPU still updates the weights. take_step waits
            # for the GPU, so the update counts as part of the next step's time.
            if (saves or evaluates) and world.device.type == "cuda":
                torch.cuda.synchronize()
            stragglers.leave()
            seconds = time.perf_counter() - began
            state.advance(int(tokens), seconds, skipped=not accepted, finished=done)
            state.last = metrics_of(state, outcome, share, tokens / seconds, waited)
            stragglers.report(step, seconds)
            profile_step()
            if saves:
                check_copies(world, model, optimizer, step)
                saver.save(model, optimizer, tokenizer, state)
            evaluated = {}
            if evaluates:
                if done:
                    saver.finish()  # commit the last checkpoint before anything else can fail
                    model.set_windows(1.0)  # as it is used; fewer steps than stages do not reach the last one
                evaluated = evaluate()
                stragglers.leave()
            progress.show(state.last, evaluated, clock.fraction(state.step, state.seconds))
            last = state.last | evaluated
            if evaluates and saver.is_best(evaluated):
                if saves:
                    saver.name_best(state.step, evaluated)
                else:
                    check_copies(world, model, optimizer, step)
                    saver.save(model, optimizer, tokenizer, state, evaluated)
            if done:
                break
            if stopping:
                saver.finish()
                raise Interrupted(
                    f"stopped after step {state.step} of {clock.steps or 'a timed run'}, saved in {run}; "
                    "rerun with --resume auto to continue (make demo needs no flag)"
                )
    return world.gather(last)[0]  # rank 0's measurements


def step_metrics(model: Transformer, world: World) -> Callable[..., dict[str, float]]:
    """Return a function that computes a step's line of metrics.jsonl."""
    flops, peak = nanochat_flops(model), peak_flops(world.device)

    def metrics_of(
        state: RunState, outcome: Outcome, lr_share: float, tokens_per_second: float, waited: float
    ) -> dict[str, float]:
        return {
            **outcome.metrics,  # first, so that none replaces a metric of the loop
            "step": state.step - 1,
            "loss": outcome.loss,
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
    """Progress of a run, by steps or by rank 0's seconds of training."""

    def __init__(self, config: LoopConfig):
        self.max_steps, self.limit = config.steps, 60 * config.minutes  # seconds; 0 is no limit
        self.steps = None if self.limit else self.max_steps  # None: not known in advance

    def fraction(self, step: int, seconds: float) -> float:
        """Fraction of the run completed before `step`, after this many seconds of training."""
        share = step / self.max_steps
        return min(1.0, max(share, seconds / self.limit)) if self.limit else share

    def is_last(self, step: int, seconds: float) -> bool:
        """Whether `step` is the last. In a timed run: whether another average step would exceed the limit."""
        over_limit = self.limit and step and seconds * (1 + 2 / step) > self.limit
        return step + 1 == self.max_steps or bool(over_limit)


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGUSR1 (which Windows has not) only sets `asked`. The
    second one is handled as it was outside.
    """

    def __enter__(self) -> StopRequest:
        self.asked = False
        self._previous = {}
        for number in STOPS:
            if threading.current_thread() is threading.main_thread():  # only it may set handlers
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        log.info("\nsaving after this step, then stopping; interrupt again to stop at once")
        self.asked = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

"""The one training loop. A stage is two values: an iterator of batches and a loss."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hotlap.model.errors import Interrupted
from hotlap.model.flops import mfu, nanochat_flops, peak_flops
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.checkpoint import Saver, check_space
from hotlap.train.data import Batch
from hotlap.train.dist import joined
from hotlap.train.log import Metrics, log
from hotlap.train.optim import MuonAdamW
from hotlap.train.schedule import ScheduleConfig, set_schedule


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

    def validate(self) -> LoopConfig:
        for name in ("steps", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip} must be 0 (off) or more")
        return self


def fit(
    config: LoopConfig,
    schedule: ScheduleConfig,
    model: GPT,
    optimizer: MuonAdamW,
    tokenizer: Tokenizer,
    batches: Iterator[list[Batch]],
    loss_fn: Callable[[GPT, Batch], Tensor],
    *,
    run: Path,
    start: int = 0,
    state: dict | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train from step `start` to the end, and return the last metrics.

    batches: for each step, its micro-batches. loss_fn: the sum of the loss over a micro-batch's targets;
    gradients are those of the sum over the step divided by all its targets. state: kept in checkpoints, and
    grows by the seconds and tokens of training. A SIGINT or SIGTERM saves and raises Interrupted.
    """
    device = model.embedding.weight.device
    state = {"seconds": 0.0, "tokens": 0} | (state or {})
    check_space(run, model, optimizer)
    flops, peak = nanochat_flops(model), peak_flops(device)
    metrics = Metrics(run / "metrics.jsonl", start)
    bar = tqdm(
        total=config.steps, initial=start, unit="step", desc=run.name, dynamic_ncols=True, disable=None
    )  # fmt: skip
    last = metrics.last or {}
    if start and (not last or last["step"] < start - 1):  # killed between its checkpoint and its line
        last = state["last"] | (evaluate() if evaluate and start == config.steps else {})
        metrics.write(last)
    with joined() as world, Saver(run, world) as saver, StopRequest() as stop:
        for step in range(start, config.steps):
            began = time.perf_counter()
            share = set_schedule(optimizer, schedule, step, config.steps)
            micro = [batch.to(device) for batch in next(batches)]
            loss, norm = take_step(model, optimizer, micro, loss_fn, config.clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} at step {step}; the last checkpoint is whole. "
                    "Try a lower learning rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            tokens = sum(b.inputs.numel() for b in micro)
            state["seconds"] += seconds
            state["tokens"] += tokens
            last = {
                "step": step,
                "loss": loss,
                "gradient_norm": norm,
                "lr_share": share,
                "tokens_per_second": tokens / seconds,
                "mfu": mfu(flops, tokens / seconds, peak),
                "seconds": state["seconds"],
                "tokens": state["tokens"],
            }
            state["last"] = last
            done = step + 1 == config.steps
            if done or (step + 1) % config.save_every == 0 or stop.asked:
                saver.save(step + 1, model, optimizer, tokenizer, state)
            if done or stop.asked:
                saver.finish()
            line = f"{run.name}: step {step + 1}/{config.steps}  loss {loss:.4f}"
            if bar.disable and (step + 1) % max(1, config.steps // 20) == 0:  # no terminal to draw on
                log.info("%s  %s tokens/s", line, f"{tokens / seconds:,.0f}")
            if evaluate and not stop.asked and (done or (step + 1) % config.evaluate_every == 0):
                last = last | evaluate()
                shown = "  ".join(f"{k} {v:.4f}" for k, v in last.items() if k.startswith("validation"))
                bar.clear()
                log.info("%s  %s", line, shown)
            metrics.write(last)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            if stop.asked and not done:
                bar.close()
                metrics.close()
                raise Interrupted(
                    f"stopped after step {step + 1} of {config.steps}, saved in {run}; the same command with "
                    "--resume goes on (make demo needs no flag)"
                )
    bar.close()
    metrics.close()
    return last


def take_step(
    model: GPT, optimizer: MuonAdamW, micro: list[Batch], loss_fn: Callable, clip: float
) -> tuple[float, float]:
    """Gradients of the mean loss over all targets of the micro-batches: returns that loss and their norm."""
    weight = sum(batch.weight for batch in micro)
    if weight == 0:
        raise ValueError("a step without a single target; every row of its batch is masked")
    total = torch.zeros((), device=micro[0].inputs.device)
    for batch in micro:
        loss = loss_fn(model, batch)
        (loss / weight).backward()
        total += loss.detach()
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return (total / weight).item(), norm.item()


class StopRequest:
    """While it is open, the first SIGINT or SIGTERM only sets `asked`; a second one does what it always
    did.
    """

    def __enter__(self) -> StopRequest:
        self.asked = False
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
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

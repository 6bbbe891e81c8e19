"""A run's metrics: progress on the terminal, and metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hotlap.common import files
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.train.run.state import RunState

if TYPE_CHECKING:
    from hotlap.train.distributed.world import World

METRICS = "metrics.jsonl"


class Metrics:
    """Appends one JSON object per step to metrics.jsonl. NaN and infinity become null."""

    def __init__(self, path: Path, first_step: int = 0):
        """Append to the file, after dropping what an interrupted run wrote from `first_step` on.

        What cannot be read is kept under another name, unless it is only a last line that was cut short.
        """
        found, lost, cut = parsed(path)
        kept = path.with_name(f"aside-{path.name}-{secrets.token_hex(4)}") if lost and not cut else None
        if lost:
            log.warning(left_out(path, lost) + (f"; all is kept as {kept.name}" if kept else ""))
        if kept:
            path.rename(kept)
        lines = [m for m in found if m["step"] < first_step]
        if again := len(found) - len(lines):
            log.info("%s: steps after step %d are taken again; %d lines are dropped", path, first_step, again)
        self._path = path
        files.write(path, "".join(map(as_line, lines)))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  lives as long as the run
        self.last = lines[-1] if lines else {}

    def write(self, values: dict) -> None:
        with files.naming(self._path):
            self._file.write(as_line(values))

    def close(self) -> None:
        with files.naming(self._path):  # it writes what a full disk has left
            self._file.close()


def as_line(values: dict) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


class Progress:
    """On rank 0: metrics.jsonl, and a progress bar on a terminal, else a log line every 5 % of the run."""

    def __init__(self, run: Path, steps: int | None, start: int, world: World):
        """steps: of the whole run; None if not known in advance."""
        from tqdm import tqdm  # benchmarks and chat run without it

        self.world, self.name, self.of = world, run.name, f"/{steps}" if steps else ""
        self.twentieth = 0
        self.metrics = Metrics(run / METRICS, start) if world.is_main else None
        self.bar = tqdm(
            total=steps, initial=start, unit="step", desc=printable(run.name), dynamic_ncols=True,
            disable=None if world.is_main else True,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    def resume(self, state: RunState, evaluate: Callable[[], dict] | None) -> dict:
        """Return the metrics of the last step; collective. If the run was killed between saving a checkpoint
        and writing that step's line, write the line now.
        """
        last = self.metrics.last if self.metrics else state.last
        if not self.world.total(state.step > 0 and last.get("step", -1) < state.step - 1)[0]:
            return last
        evaluated = evaluate() if evaluate and state.finished else {}
        self.show(state.last, evaluated, float(state.finished))
        return state.last | evaluated

    def show(self, values: dict, evaluated: dict, over: float) -> None:
        """Log a step's metrics and those of the validation after it. over: completed fraction of the run."""
        if not self.metrics:
            return
        goal = "reward" if "reward" in values else "loss"
        line = f"{self.name}: step {values['step'] + 1}{self.of}  {goal} {values[goal]:.4f}"
        new, self.twentieth = int(20 * over) > self.twentieth, int(20 * over)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s"
        if evaluated:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items() if k.startswith("validation"))
            self.bar.clear()
            log.info("%s  %s", line, shown)
        elif self.bar.disable and new:
            log.info("%s  %s", line, speed)
        self.metrics.write(values | evaluated)
        self.bar.set_postfix_str(f"{goal} {values[goal]:.3f}, {speed}", refresh=False)
        self.bar.update()


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. Those that cannot be read are left out, with a warning."""
    found, lost, _ = parsed(path)
    if lost:
        log.warning(left_out(path, lost))
    return found


def left_out(path: Path, lost: int) -> str:
    if not path.is_file():
        return f"{path} is not a file and cannot be read"
    return f"{path}: {lost} {'lines' if lost > 1 else 'line'} cannot be read, left out"


def parsed(path: Path) -> tuple[list[dict], int, bool]:
    """The lines of metrics.jsonl that can be read, how many others there are, and whether that is only the
    last one, without its end, as a killed process leaves it.
    """
    if not path.is_file():
        return [], int(path.exists()), False
    raw = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    lines = [step_line(line) for line in raw]
    lost = lines.count(None)
    cut = lost == 1 and lines[-1] is None and not path.read_bytes().endswith(b"\n")
    return [line for line in lines if line is not None], lost, cut


def step_line(line: bytes) -> dict | None:
    """The values of a step; None if the line has none. NaN and infinity are None."""
    try:
        values = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)
        step = values["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return values if type(step) is int and step >= 0 else None


def number(values: dict, name: str) -> float | None:
    """A number in a line of metrics, or another object of JSON; None if it has no such number."""
    value = values.get(name)
    usable = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if usable else None


def shown(value: float | None, form: str, unit: str = "", missing: str = "n/a") -> str:
    return missing if value is None else f"{value:{form}}{unit}"

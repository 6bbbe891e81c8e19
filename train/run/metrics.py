"""A run's metrics: progress on the terminal, and metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from hotlap.common import files
from hotlap.common.log import log
from hotlap.train.distributed.world import World
from hotlap.train.run.state import RunState

METRICS = "metrics.jsonl"


class Metrics:
    """Appends one JSON object per step to metrics.jsonl. NaN and infinity become null."""

    def __init__(self, path: Path, first_step: int = 0):
        """Append to the file, after dropping what an interrupted run wrote from `first_step` on."""
        lines = [m for m in read_metrics(path) if m["step"] < first_step] if path.exists() else []
        self._path = path
        files.write(path, "".join(map(as_line, lines)))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  lives as long as the run
        self.last = lines[-1] if lines else {}

    def write(self, values: dict) -> None:
        with files.naming(self._path):
            self._file.write(as_line(values))

    def close(self) -> None:
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
            total=steps, initial=start, unit="step", desc=run.name, dynamic_ncols=True,
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
        line = f"{self.name}: step {values['step'] + 1}{self.of}  loss {values['loss']:.4f}"
        new, self.twentieth = int(20 * over) > self.twentieth, int(20 * over)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s"
        if evaluated:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items() if k.startswith("validation"))
            self.bar.clear()
            log.info("%s  %s", line, shown)
        elif self.bar.disable and new:
            log.info("%s  %s", line, speed)
        self.metrics.write(values | evaluated)
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed}", refresh=False)
        self.bar.update()


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, without any that a kill cut short."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines

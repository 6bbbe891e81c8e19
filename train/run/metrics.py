"""What a run says: lines for people, and metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hotlap.common.log import log


class Metrics:
    """Appends one JSON object a step to metrics.jsonl. Values that are not finite become null."""

    def __init__(self, path: Path, first_step: int = 0):
        """Go on with the file, without what an interrupted run wrote from `first_step` on."""
        lines = [m for m in read_metrics(path) if m["step"] < first_step] if path.exists() else []
        self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  lives as long as the run
        self.last = lines[-1] if lines else None
        for line in lines:
            self.write(line)

    def write(self, values: dict) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")

    def close(self) -> None:
        self._file.close()


class Progress:
    """A bar on a terminal, else a line in twenty, and metrics.jsonl: of the one rank that speaks."""

    def __init__(self, run: Path, steps: int | None, start: int, speaks: bool):
        """steps: of the whole run, where that is known before."""
        from tqdm import tqdm  # measuring and serving do without

        self.name, self.of, self.twentieth = run.name, f"/{steps}" if steps else "", 0
        self.metrics = Metrics(run / "metrics.jsonl", start) if speaks else None
        self.bar = tqdm(
            total=steps, initial=start, unit="step", desc=run.name, dynamic_ncols=True,
            disable=None if speaks else True,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    @property
    def last(self) -> dict:
        """The last line that the file had when this opened it."""
        return (self.metrics.last if self.metrics else None) or {}

    def show(self, values: dict, evaluated: dict, over: float) -> None:
        """What a step came to, what was measured after it, and the share of the run that is over."""
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
    """The lines of metrics.jsonl; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines

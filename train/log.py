"""What a run says: lines for people, and metrics.jsonl for programs."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

log = logging.getLogger("hotlap")


def set_up_logging() -> None:
    """Send the project's log to standard error, one line a record. Called by programs, never on import."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


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


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines

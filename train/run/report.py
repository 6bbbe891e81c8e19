"""A run's report.md and curves.png, from metrics.jsonl and config.json; and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.common.terminal import printable
from hotlap.train.config import ReportConfig
from hotlap.train.run.card import CARD, write_card
from hotlap.train.run.folder import read_config, read_machine
from hotlap.train.run.metrics import METRICS, number, read_metrics, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of metrics in reports, if not their keys.
NAMES = {"validation_bpb": "validation bits per byte"}


def write_report(run: Path) -> Path:
    """Write report.md, curves.png and the model card into a run's directory, and return the report's path."""
    if not (run / METRICS).is_file():
        raise FileNotFoundError(f"no {METRICS} in {run}; give a run's directory")
    metrics = read_metrics(run / METRICS)
    if not metrics:
        raise DataError(f"{run / METRICS} has no step that can be read; the run has not completed a step yet")
    last = metrics[-1]
    speeds = sorted(v for m in metrics if (v := number(m, "tokens_per_second")) is not None)
    device, date = read_machine(run)
    rows = {
        "device": device or "n/a",
        "started": date or "n/a",
        "steps": f"{last['step'] + 1:,}",
        "tokens": shown(number(last, "tokens"), ",.0f"),
        "training time": shown(number(last, "seconds"), ".0f", " s"),
        "tokens/s (median)": shown(speeds[len(speeds) // 2] if speeds else None, ",.0f"),
        "MFU (nanochat's formula)": shown(number(last, "mfu"), ".1%", missing="n/a (unknown peak)"),
        "training loss": shown(number(last, "loss"), ".4f"),
    }
    validations = [{k: v for k, v in m.items() if k.startswith("validation")} for m in metrics]
    validated = next(filter(None, reversed(validations)), {})
    for name in validated:
        rows[NAMES.get(name, name.replace("_", " "))] = shown(number(validated, name), ".4f")
    lines = [
        f"# {run.name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
        "",
    ]
    if draw_curves(metrics, run / "curves.png", device, date):
        lines += ["![loss and throughput](curves.png)", ""]
    try:
        config = json.dumps(read_config(run), indent=1)
        lines += ["## Configuration", "", "```json", config, "```", ""]
    except DataError as error:
        log.warning("the report is without the configuration: %s", error)
    lines += [f"[Model card]({CARD}): how the model was made, and what it is not for.", ""]
    write_card(run)
    path = run / "report.md"
    files.write(path, "\n".join(lines))
    return path


def draw_curves(metrics: list[dict], path: Path, *facts: str) -> bool:
    """Plot loss and tokens/s over the tokens seen, with the facts below, and what else tells how training
    goes: for pairs, in how many the preferred answer has the higher reward; for rewards, their mean. Returns
    False, and logs why, without matplotlib.
    """
    unit, further = "", ()
    if any("accuracy" in m for m in metrics):
        unit, further = "pair", ("accuracy", "preferences met (share of pairs)")
    if any("reward" in m for m in metrics):
        unit, further = "token, by its advantage", ("reward", "mean reward of an answer")
    figure = new_figure(figsize=(13 if further else 9, 3.4))
    if figure is None:
        return False

    def points(name: str, unit: float = 1) -> tuple[list[float], list[float]]:
        """Millions of tokens, and a metric."""
        pairs = [(number(m, "tokens"), number(m, name)) for m in metrics]
        known = [(tokens / 1e6, value / unit) for tokens, value in pairs if None not in (tokens, value)]
        return [x for x, _ in known], [y for _, y in known]

    def draw(axes: Axes, name: str, label: str) -> None:
        """A metric, and its validation."""
        axes.plot(*points(name), lw=0.8, label="training")
        validated = points(f"validation_{name}")
        if validated[0]:
            axes.plot(*validated, "o-", label=f"validation, {validated[1][-1]:.3f} in the end")
        axes.set(xlabel="tokens (millions)", ylabel=label)
        axes.legend()

    loss, *middle, speed = panels = figure.subplots(1, 3 if further else 2)
    draw(loss, "loss", f"loss (per {unit})" if further else "loss (nats per token)")
    for axes in middle:
        draw(axes, *further)
    speed.plot(*points("tokens_per_second", 1e3), lw=0.8)
    speed.set(xlabel="tokens (millions)", ylabel="thousand tokens/s", ylim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
    caption(figure, *facts)
    save_figure(figure, path)
    return True


def main(config: ReportConfig) -> None:
    """`hotlap report`."""
    print(printable(str(write_report(config.run))))

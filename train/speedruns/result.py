"""The result of a speedrun: result.json, and report.md with its curve beside the records."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hotlap.common import files
from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.common.terminal import printable
from hotlap.train.run.folder import read_machines
from hotlap.train.run.metrics import METRICS, read_metrics
from hotlap.train.speedruns.records import Record


def write_result(
    out: Path,
    title: str,
    result: dict,
    runs: list[Path],
    records: list[Record],
    score: str = "validation_bpb",
    more: Sequence[str] = (),
) -> None:
    """Write result.json with device and date, curves.png and report.md, and print the report.

    runs, records, score: see `draw_comparison`. more: lines that end the report.
    """
    device, date = read_machines(runs)
    result = {**result, "device": device, "date": date}
    files.write_object(out / "result.json", result)
    draw_comparison(runs, records, score, out / "curves.png", device, date)
    lines = [f"# {title[0].upper()}{title[1:]}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {shown(value)} |" for name, value in result.items()]
    if (out / "curves.png").exists():
        lines += ["", "![validation of the runs and the records](curves.png)"]
    lines += ["", *more] if more else []
    files.write(out / "report.md", "\n".join([*lines, ""]))
    print(printable("\n".join([*lines, "", str(out / "report.md")])))


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def draw_comparison(runs: list[Path], records: list[Record], score: str, path: Path, *facts: str) -> bool:
    """Draw the validation curves of runs over tokens and over training seconds, with the records as points
    and the facts below. Runs that were validated only once have no curve, so their training loss is drawn,
    unless there are records to set them against. False if matplotlib is missing.

    score: the metric, validation_loss or validation_bpb.
    """
    figure = new_figure(figsize=(9, 4))
    if figure is None:
        return False
    metrics = {run.name: read_metrics(run / METRICS) for run in runs}
    once = all(sum(score in line for line in lines) < 2 for lines in metrics.values())
    drawn = "loss" if once and not records else score
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for name, lines in metrics.items():
            points = [(line[axis], line[drawn]) for line in lines if line.get(drawn) is not None]
            last = next((line[score] for line in reversed(lines) if line.get(score) is not None), None)
            label = name if last is None else f"{name}: {named(score)} {last:.4f} in the end"
            style = "-" if drawn == "loss" else "o" if once else "o-"
            axes.plot([x for x, _ in points], [y for _, y in points], style, lw=0.8, ms=3, label=label)
        labelled = 0.0
        for record in sorted(records, key=lambda record: getattr(record, axis)):
            place = getattr(record, axis), record.score
            axes.plot(*place, "x", color="gray")
            if place[0] > 1.3 * labelled:  # else its name would cover the one before
                axes.annotate(record.name, place, (0, 6), textcoords="offset points", fontsize=6, rotation=60)
                labelled = place[0]
        axes.set(xlabel=axis, xscale="log" if records else "linear")
        axes.margins(0.08 if records else 0.05)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.axes[0].set(ylabel="training loss" if drawn == "loss" else named(score))
    caption(figure, *facts)
    save_figure(figure, path)
    return True


def named(score: str) -> str:
    return {"validation_bpb": "validation bits per byte", "validation_loss": "validation loss"}[score]


def talk_to(model: Path) -> int:
    """Open a chat with a model if this is a terminal, and return its exit code."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return 0
    return subprocess.call([sys.executable, "-m", "hotlap.cli", "chat", str(model)])

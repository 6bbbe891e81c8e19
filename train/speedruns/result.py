"""The result of a speedrun: result.json, and report.md with its curve beside the records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hotlap.common import files
from hotlap.common.plots import new_figure, save_figure
from hotlap.train.run.metrics import read_metrics
from hotlap.train.speedruns.records import Record


def write_result(
    out: Path,
    title: str,
    result: dict,
    runs: list[Path],
    records: list[Record],
    score: str = "validation_bpb",
) -> None:
    """Write result.json, curves.png and report.md, and print the report.

    runs, records, score: see `draw_comparison`.
    """
    files.write(out / "result.json", json.dumps(result, indent=1) + "\n")
    draw_comparison(runs, records, score, out / "curves.png")
    lines = [f"# {title[0].upper()}{title[1:]}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {shown(value)} |" for name, value in result.items()]
    if (out / "curves.png").exists():
        lines += ["", "![validation of the runs and the records](curves.png)"]
    files.write(out / "report.md", "\n".join([*lines, ""]))
    print("\n".join([*lines, "", str(out / "report.md")]))


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def draw_comparison(runs: list[Path], records: list[Record], score: str, path: Path) -> bool:
    """Draw the validation curves of runs over tokens and over training seconds, with the records as points.
    False if matplotlib is missing.

    score: the metric, validation_loss or validation_bpb.
    """
    figure = new_figure(figsize=(9, 4))
    if figure is None:
        return False
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for run in runs:
            lines = [m for m in read_metrics(run / "metrics.jsonl") if score in m]
            axes.plot([m[axis] for m in lines], [m[score] for m in lines], "o-", ms=3, label=run.name)
        for record in records:
            axes.plot(getattr(record, axis), record.score, "x", color="gray")
            axes.annotate(record.name, (getattr(record, axis), record.score), fontsize=6, rotation=45)
        axes.set(xlabel=axis, xscale="log" if records else "linear")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.axes[0].set(ylabel=score.replace("_", " "))
    save_figure(figure, path)
    return True


def talk_to(model: Path) -> int:
    """Open a chat with a model if this is a terminal, and return its exit code."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return 0
    return subprocess.call([sys.executable, "-m", "hotlap.cli", "chat", str(model)])

"""A run's report.md and curves.png, from metrics.jsonl and config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hotlap.common import options
from hotlap.common.errors import DataError
from hotlap.common.files import write
from hotlap.common.plots import new_figure, save_figure
from hotlap.train.run.metrics import read_metrics

# Names of metrics in reports, if not their keys.
NAMES = {"validation_bpb": "validation bits per byte"}


@dataclass(frozen=True)
class ReportConfig:
    """Rewrite a run's report.md and curves.png."""

    run: Path = Path("runs/pretrain")
    """Run directory."""


def write_report(run: Path) -> Path:
    """Write report.md and curves.png into a run's directory, and return the report's path."""
    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {run}; give a run's directory")
    metrics = read_metrics(run / "metrics.jsonl")
    if not metrics:
        raise DataError(f"{run / 'metrics.jsonl'} is empty; the run has not completed a step yet")
    last = metrics[-1]
    speed = sorted(m["tokens_per_second"] for m in metrics)[len(metrics) // 2]
    utilisation = "n/a (unknown peak)" if last["mfu"] is None else f"{last['mfu']:.1%}"
    rows = {
        "steps": f"{last['step'] + 1:,}",
        "tokens": f"{last['tokens']:,}",
        "training time": f"{last['seconds']:.0f} s",
        "tokens/s (median)": f"{speed:,.0f}",
        "MFU (nanochat's formula)": utilisation,
        "training loss": f"{last['loss']:.4f}",
    }
    validations = [{k: v for k, v in m.items() if k.startswith("validation")} for m in metrics]
    for name, value in next(filter(None, reversed(validations)), {}).items():
        shown = "n/a" if value is None else f"{value:.4f}"
        rows[NAMES.get(name, name.replace("_", " "))] = shown
    lines = [
        f"# {run.name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
        "",
    ]
    if draw_curves(metrics, run / "curves.png"):
        lines += ["![loss and throughput](curves.png)", ""]
    config = json.dumps(json.loads((run / "config.json").read_text()), indent=1)
    lines += ["## Configuration", "", "```json", config, "```", ""]
    path = run / "report.md"
    write(path, "\n".join(lines))
    return path


def draw_curves(metrics: list[dict], path: Path) -> bool:
    """Plot loss and tokens/s over the tokens seen. Returns False, and logs why, without matplotlib."""
    figure = new_figure(figsize=(9, 3.4))
    if figure is None:
        return False
    tokens = [m["tokens"] / 1e6 for m in metrics]
    evaluated = [m for m in metrics if "validation_loss" in m]
    loss, speed = figure.subplots(1, 2)
    loss.plot(tokens, [m["loss"] for m in metrics], lw=0.8, label="training")
    validated = [m["validation_loss"] for m in evaluated]
    if evaluated:
        loss.plot([m["tokens"] / 1e6 for m in evaluated], validated, "o-", label="validation")
    loss.set(xlabel="tokens (millions)", ylabel="loss (nats per token)")
    loss.legend()
    speed.plot(tokens, [m["tokens_per_second"] / 1e3 for m in metrics], lw=0.8)
    speed.set(xlabel="tokens (millions)", ylabel="thousand tokens/s", ylim=(0, None))
    for axes in (loss, speed):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True


def main(arguments: list[str]) -> None:
    """`hotlap report`."""
    print(write_report(options.parse(ReportConfig, arguments, command="report").run))

"""Plots of result files: `draw` saves what one of the other functions draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hotlap.bench import results
from hotlap.common.plots import caption, new_figure, save_figure

DIRECTIONS = ("forward", "backward", "both")
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)


def draw(path: Path, content: Callable[[Any, list[dict]], None]) -> bool:
    """Save a figure of a result file beside it: its rows that have a time, drawn by content(figure, rows),
    with device and date below. False if no row has a time, or there is no matplotlib.
    """
    found = results.load(path)
    timed = [row for row in found["rows"] if row.get("ms") is not None]
    figure = new_figure() if timed else None
    if figure is None:
        return False
    content(figure, timed)
    caption(figure, found["device"], found["date"])
    save_figure(figure, path.with_suffix(".png"))
    return True


def kernels(figure: Any, rows: list[dict]) -> None:
    """Share of the measured ceiling: a line per operation, a panel per direction, a dot per provider."""

    def operation_of(row: dict) -> str:
        name, _, size = row["case"].split(" ", 2)
        return f"{name} {size}"

    operations = list(dict.fromkeys(map(operation_of, rows)))
    providers = sorted({row["provider"] for row in rows}, key=lambda name: (name != "hotlap", name))
    figure.set_size_inches(11, 1.6 + 0.24 * len(operations))
    panels = figure.subplots(1, len(DIRECTIONS), sharey=True, sharex=True, squeeze=False)[0]
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        for i, provider in reversed(list(enumerate(providers))):  # ours last, so on top
            dots = [
                (row["share_of_ceiling"], operations.index(operation_of(row)))
                for row in rows
                if row["provider"] == provider and row["case"].split()[1] == direction
            ]
            ours = provider == "hotlap"
            axes.scatter(
                [share for share, _ in dots], [place for _, place in dots], label=provider, color=f"C{i}",
                marker="D" if ours else "o", s=42 if ours else 20, alpha=1 if ours else 0.75,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=direction, xscale="log", ylim=(len(operations) - 0.5, -0.5))
        axes.set_xticks(TICKS, [f"{100 * tick:g} %" for tick in TICKS], fontsize=8)
        axes.set_xticks([], minor=True)
        shares = [row["share_of_ceiling"] for row in rows]
        axes.set_xlim(0.7 * min(shares), 1.5 * max(1, *shares))
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(operations)), operations, fontsize=7)
    panels[1].set_xlabel("share of the measured ceiling (of a copy, or of a large matmul)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper left", ncols=min(8, len(labels)), fontsize=8
    )


def training(phases: tuple[str, ...], figure: Any, rows: list[dict]) -> None:
    """A bar per model: milliseconds of each phase of its step."""
    figure.set_size_inches(9, 1.6 + 0.34 * len(rows))
    axes, left = figure.subplots(), [0.0] * len(rows)
    for phase in phases:
        widths = [row[f"{phase}_ms"] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=phase.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (row, end) in enumerate(zip(rows, left, strict=True)):
        text = f" {row['tokens_per_second']:,.0f} tokens/s"
        if row["mfu_nanochat"] is not None:
            text += f", MFU {row['mfu_nanochat']:.0%}"
        axes.text(end, place, text, va="center", fontsize=7)
    names = [row["case"] + row["provider"].removeprefix("hotlap") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set(xlabel="ms per step", xlim=(0, 1.35 * max(left)), ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside upper left", ncols=len(phases), fontsize=8)


def inference(figure: Any, rows: list[dict]) -> None:
    """Tokens/s over the batch size, and the limit that memory bandwidth sets."""
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        batches = [int(row["case"].split()[-1]) for row in own]
        axes.plot(batches, [row["tokens_per_second"] for row in own], "o-", label=provider)
    limits = {int(row["case"].split()[-1]): 1e3 / row["limit_ms"] for row in rows}
    speeds = [batch * steps for batch, steps in limits.items()]
    axes.plot(list(limits), speeds, "k--", label="limit by measured memory bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(limits), list(map(str, limits)))
    axes.set(xlabel="batch size", ylabel="tokens/s", yscale="log")
    axes.set_title(rows[0]["case"].rsplit(" batch", 1)[0], fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def serving(figure: Any, rows: list[dict]) -> None:
    """Tokens/s, and the time to the first token, over the number of streams."""
    figure.set_size_inches(9, 4)
    rows = [row for row in rows if row["case"].split()[-2] == "streams"]
    counts = [int(row["case"].split()[-1]) for row in rows]
    speed, wait = figure.subplots(1, 2)
    speed.plot(counts, [row["tokens_per_second"] for row in rows], "o-")
    speed.set(ylabel="tokens/s", ylim=(0, None))
    wait.plot(counts, [row["first_token_ms"] for row in rows], "o-", label="median")
    wait.plot(counts, [row["first_token_ms_99"] for row in rows], "s--", label="99 of 100 are faster")
    wait.set(ylabel="ms to the first token", ylim=(0, None))
    wait.legend(fontsize=8)
    for axes in (speed, wait):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_xlabel("streams at once")
        axes.grid(alpha=0.3)
    figure.suptitle(rows[0]["case"].rsplit(" streams", 1)[0], fontsize=9)

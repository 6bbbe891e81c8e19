"""The picture of a report card: a row for each task, our scores with intervals, published ones as marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hotlap.common.plots import caption, new_figure, save_figure
from hotlap.train.evaluation.chatcore import CHANCE
from hotlap.train.speedruns.chat_records import ChatRecord

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red")
MARKS = "sDv^<>phd"  # one for each model
NOT_DRAWN = "bpb", "midtraining"  # no share, and a stage that another replaces


def draw(
    path: Path,
    stages: dict[str, dict[str, dict]],
    published: Sequence[ChatRecord],
    order: Sequence[str],
    *facts: str,
) -> bool:
    """Draw the scores of stages (task -> score, interval), from top to bottom in this order, with the facts
    below. False if matplotlib is missing, or there is no share to draw.
    """
    names = {task for scores in stages.values() for task in scores} - {*NOT_DRAWN}
    tasks = [task for task in order if task in names] + sorted(names - {*order})
    figure = tasks and new_figure(figsize=(10, 1.6 + max(0.42 * len(tasks), 2.2)))
    if not figure:
        return False
    axes = figure.subplots()
    rows = {task: -row for row, task in enumerate(tasks)}
    for number, (stage, scores) in enumerate(stages.items()):
        found = [task for task in tasks if task in scores]
        if not found:
            continue
        lift = 0.22 - 0.44 * (number + 0.5) / len(stages)  # the stages of a row, one below the other
        x, y = [scores[task]["score"] for task in found], [rows[task] + lift for task in found]
        ends = [scores[task]["interval"] or [scores[task]["score"]] * 2 for task in found]
        sizes = [[abs(value - end[i]) for value, end in zip(x, ends, strict=True)] for i in (0, 1)]
        axes.errorbar(
            x, y, xerr=sizes, fmt="o", ms=5, capsize=2, color=COLORS[number % len(COLORS)], label=stage,
            zorder=3,
        )  # fmt: skip
    draw_published(axes, rows, published)
    for task, row in rows.items():
        if chance := CHANCE.get(task):
            axes.plot([chance] * 2, [row - 0.4, row + 0.4], ":", color="0.6", lw=1)
    axes.set(
        xlabel="score" + " (dotted: chance)" * any(task in CHANCE for task in tasks),
        xlim=(min(-0.02, axes.get_xlim()[0]), 1.02),
        ylim=(0.6 - len(tasks), 0.6),
    )
    axes.set_yticks([*rows.values()], [*rows])
    axes.grid(axis="x", alpha=0.3)
    for row in list(rows.values())[1:]:
        axes.axhline(row + 0.5, color="0.9", lw=0.8)
    named = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] not in stages
    )
    axes.legend(*zip(*named, strict=True), fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    caption(figure, *facts)
    save_figure(figure, path)
    return True


def draw_published(axes, rows: dict[str, int], published: Sequence[ChatRecord]) -> None:
    """Gray marks below ours, one shape for each model; filled after RL."""
    models = list(dict.fromkeys((r.model, r.date) for r in published))
    labelled = set()
    for record in published:
        found = [task for task in record.scores if task in rows]
        if not found or record.stage in NOT_DRAWN:
            continue
        model = record.model, record.date
        name = f"nanochat {', '.join(filter(None, model))}{' [own]' * record.own}"
        axes.plot(
            [record.scores[task] for task in found], [rows[task] - 0.32 for task in found],
            MARKS[models.index(model) % len(MARKS)], ms=4.5, color="0.45", mew=0.8,
            fillstyle="full" if record.stage == "RL" else "none",
            label=None if model in labelled else name,
        )  # fmt: skip
        labelled.add(model)
    if labelled:
        axes.plot([], [], "s", ms=4.5, color="0.45", label="filled: after RL; hollow: after SFT, CORE: base")

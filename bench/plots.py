"""Results as pictures."""

from __future__ import annotations

from pathlib import Path

from hotlap.train.log import log


def draw_kernels(rows: list[dict], path: Path) -> bool:
    """A bar for each case and provider: its share of the measured ceiling. False where matplotlib is
    missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture of the results: matplotlib is missing; pip install 'hotlap[plot]'")
        return False
    timed = [row for row in rows if row.get("ms") is not None]
    if not timed:
        return False
    cases = list(dict.fromkeys(row["case"] for row in timed))
    places = [i + cases.index(row["case"]) for i, row in enumerate(timed)]  # a gap before each case
    figure = Figure(figsize=(9, 1.5 + 0.11 * (len(timed) + len(cases))), layout="constrained")
    axes = figure.subplots()
    for provider in dict.fromkeys(row["provider"] for row in timed):
        bars = [(i, row) for i, row in zip(places, timed, strict=True) if row["provider"] == provider]
        axes.barh([i for i, _ in bars], [row["share_of_ceiling"] for _, row in bars], label=provider)
    first = {row["case"]: i for i, row in reversed(list(zip(places, timed, strict=True)))}
    axes.set_yticks([first[case] for case in cases], cases, fontsize=7)
    axes.set_ylim(places[-1] + 1, -1)
    axes.set(xlabel="share of the measured ceiling (copy or product)", xlim=(0, None))
    axes.legend(fontsize=7)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return True

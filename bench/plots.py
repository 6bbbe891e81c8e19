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
    cases = list(dict.fromkeys(row["case"] for row in timed))
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    if not timed:
        return False
    figure = Figure(figsize=(9, 1 + 0.14 * len(cases) * (len(providers) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(providers)
    for k, provider in enumerate(providers):
        of = {row["case"]: row["share_of_ceiling"] for row in timed if row["provider"] == provider}
        at = [i + k * height for i, case in enumerate(cases) if case in of]
        axes.barh(at, [of[case] for case in cases if case in of], height, label=provider)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="share of the measured ceiling (copy or product)", xlim=(0, None))
    axes.legend(fontsize=7)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return True

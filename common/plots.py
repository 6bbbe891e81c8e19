"""Figures, if matplotlib is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hotlap.common.files import replacing
from hotlap.common.log import log

CAPTION = 0.22  # inches at the bottom of a figure


def new_figure(**settings: Any) -> Any | None:
    """A matplotlib Figure without a window. None if matplotlib is missing, which is logged once.

    settings: arguments of Figure, such as figsize in inches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log_missing()
        return None
    return Figure(layout="constrained", **settings)


def caption(figure: Any, *facts: str) -> None:
    """Write facts in small type below what is drawn: the device and the date of a measurement, and whatever
    else its reader must know. Call it once, when the figure has its size.
    """
    share = CAPTION / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    figure.text(
        0.995, 0.25 * share, ", ".join(filter(None, facts)), ha="right", va="bottom", fontsize=7, color="0.4",
        parse_math=False,
    )  # fmt: skip


def save_figure(figure: Any, path: Path, of: str | None = None) -> None:
    """Write a figure as an image, whole or not at all. of: what a PNG says in itself that it is made from."""
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format=path.suffix[1:], metadata={"Source": of} if of else None)


@functools.cache
def log_missing() -> None:
    log.info("no plots, as matplotlib is missing: pip install 'hotlap[plot]'")

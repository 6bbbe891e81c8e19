"""Figures, if matplotlib is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hotlap.common.files import replacing
from hotlap.common.log import log


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


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as an image, whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format=path.suffix[1:])


@functools.cache
def log_missing() -> None:
    log.info("no plots, as matplotlib is missing: pip install 'hotlap[plot]'")

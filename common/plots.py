"""Figures, where matplotlib is installed."""

from __future__ import annotations

import functools
from typing import Any

from hotlap.common.log import log


def new_figure(**settings: Any) -> Any | None:
    """A matplotlib Figure that no window belongs to. None where matplotlib is missing, which is logged once.

    settings: as matplotlib takes them, such as figsize in inches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say_what_is_missing()
        return None
    return Figure(layout="constrained", **settings)


@functools.cache
def say_what_is_missing() -> None:
    log.info("no pictures: matplotlib is missing; pip install 'hotlap[plot]'")

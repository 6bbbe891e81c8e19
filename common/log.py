"""The logger of hotlap."""

from __future__ import annotations

import logging
import sys
from functools import cache

from hotlap.common.terminal import printable

log = logging.getLogger("hotlap")


class Formatter(logging.Formatter):
    """The message alone, as a terminal may have it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging() -> None:
    """Send the log to standard error, one line per record. Called by programs, never on import."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)


@cache
def log_once(message: str) -> None:
    """A line that readers of the same data would repeat, such as how much of it is left out."""
    log.warning(message)

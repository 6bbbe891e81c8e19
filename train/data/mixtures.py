"""Mixtures: what `--data` names, as NAME or NAME:WEIGHT each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

MOST_PASSES = 1000


class Part(NamedTuple):
    """A data set of a mixture: its name or path, and the passes over it in an epoch of the mixture."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"


def parts_of(data: str | Sequence[str]) -> list[Part]:
    """The parts that a mixture names. A single string, as older configurations have it, is one entry.
    ValueError for a weight that is none.
    """
    entries = [data] if isinstance(data, str) else data
    if not entries:
        raise ValueError("no data is named; name a file, or see --help for what else it may be")
    return [part_of(entry) for entry in entries]


def part_of(entry: str) -> Part:
    """The part that an entry names. What exists is a path, whatever colons it has."""
    name, colon, weight = entry.rpartition(":")
    if not colon or os.path.lexists(os.path.expanduser(entry)):
        return Part(entry)
    try:
        passes = float(weight)
    except ValueError:
        raise ValueError(
            f"the data {entry!r} is no file, and {weight!r} is no weight; write NAME:WEIGHT, such as mmlu:3"
        ) from None
    if not 0 < passes <= MOST_PASSES:
        raise ValueError(
            f"the weight in the data {entry!r} must be above 0, and at most {MOST_PASSES}: it is the number "
            "of passes over this data set in an epoch"
        )
    return Part(name, passes)

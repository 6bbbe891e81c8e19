"""Checks of the numbers in a configuration. A ValueError names the field, its value, and what is needed."""

from __future__ import annotations

import math

TOO_LARGE = 2**63  # for the integers of torch, numpy and Python's ranges


def at_least(config: object, least: int, *names: str, zero: str = "") -> None:
    """The fields are finite numbers of at least `least`. zero: what 0 means, if it is special."""
    for name in names:
        value = getattr(config, name)
        if not least <= value < (TOO_LARGE if isinstance(value, int) else math.inf):
            wanted = f"0 ({zero}) or more" if zero else f"at least {least}"
            refuse(config, name, wanted + (", and less than 2^63" if value > least else ""))


def positive(config: object, *names: str) -> None:
    """The fields are finite numbers above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            refuse(config, name, "a positive number")


def between(config: object, low: float, high: float, *names: str) -> None:
    """The fields are numbers from `low` to `high`."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            refuse(config, name, f"from {low:g} to {high:g}")


def refuse(config: object, name: str, wanted: str) -> None:
    raise ValueError(f"{name}={getattr(config, name)} must be {wanted}")

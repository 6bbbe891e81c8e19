"""Checks of the numbers in a configuration. A ValueError names the field, its value, and what is needed."""

from __future__ import annotations

TOO_LARGE = 2**63  # for the integers of torch, numpy and Python's ranges; no float need be larger


def at_least(config: object, least: int, *names: str, zero: str = "") -> None:
    """The fields are numbers from `least` to less than 2^63. zero: what 0 means, if it is special."""
    for name in names:
        value = getattr(config, name)
        if not least <= value < TOO_LARGE:
            wanted = f"0 ({zero}) or more" if zero else f"at least {least}"
            refuse(config, name, wanted + (", and less than 2^63" if value > least else ""))


def positive(config: object, *names: str) -> None:
    """The fields are numbers above 0, and less than 2^63."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < TOO_LARGE:
            refuse(config, name, "positive" + (", and less than 2^63" if value > 0 else ""))


def between(config: object, low: float, high: float, *names: str) -> None:
    """The fields are numbers from `low` to `high`."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            refuse(config, name, f"a number from {low:g} to {high:g}")


def refuse(config: object, name: str, wanted: str) -> None:
    value = str(getattr(config, name))
    raise ValueError(f"{name}={value if len(value) < 50 else value[:40] + '...'} must be {wanted}")

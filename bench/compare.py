"""`hotlap bench compare BEFORE AFTER`: what got slower between two result files of one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from hotlap.bench import results


@dataclass(frozen=True)
class CompareConfig:
    """Say what got slower between two result files of one device."""

    before: tyro.conf.Positional[Path] = Path("before.json")
    """The older file."""
    after: tyro.conf.Positional[Path] = Path("after.json")
    """The newer file."""


def compare(config: CompareConfig) -> list[str]:
    """A line for each case that both files hold: the ratio of times, and SLOWER or faster beyond their
    spread; and what was not measured the second time, with the reason.

    ValueError where the files come from different devices: their times say nothing about the code.
    """
    before, after = results.load(config.before), results.load(config.after)
    if before["device"] != after["device"]:
        raise ValueError(
            f"{config.before} is of {before['device']}, {config.after} of {after['device']}; "
            "compare files of one device"
        )
    old = {(row["case"], row["provider"]): row for row in before["rows"] if row.get("ms") is not None}
    lines = []
    for row in after["rows"]:
        was = old.get((row["case"], row["provider"]))
        if row.get("ms") is None:
            lines.append(f"{row['case']:44} {row['provider']:14} {row.get('note', '')}")
        if was is None or row.get("ms") is None:
            continue
        verdict = ""
        if row["ms_low"] > was["ms_high"]:
            verdict = "SLOWER"
        elif row["ms_high"] < was["ms_low"]:
            verdict = "faster"
        ratio = row["ms"] / was["ms"]
        lines.append(f"{row['case']:44} {row['provider']:14} {ratio:6.2f}x time  {verdict}")
    return lines

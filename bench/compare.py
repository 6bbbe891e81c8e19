"""`hotlap bench compare BEFORE AFTER`: what got slower between two result files of the same device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from hotlap.common.terminal import printable


@dataclass(frozen=True)
class CompareConfig:
    """Show what got slower between two result files of the same device."""

    before: tyro.conf.Positional[Path] = Path("before.json")
    """The older file."""
    after: tyro.conf.Positional[Path] = Path("after.json")
    """The newer file."""


def compare(config: CompareConfig) -> list[str]:
    """A line for each case in both files: the ratio of times, and SLOWER or faster if it exceeds the spread.
    Then the cases that the second file has no time for, and how the files differ otherwise.

    ValueError if the files are from different devices or have no case in common.
    """
    from hotlap.bench import results  # imports torch

    before, after = results.load(config.before), results.load(config.after)
    if before["device"] != after["device"]:
        raise ValueError(
            f"{config.before} is from {before['device']}, {config.after} from {after['device']}; "
            "compare files from the same device"
        )
    old = {(row["case"], row["provider"]): row for row in before["rows"] if row.get("ms") is not None}
    if not any((row["case"], row["provider"]) in old for row in after["rows"]):
        raise ValueError(
            f"{config.before} ({before['kind']}) and {config.after} ({after['kind']}) have no timed case in "
            "common; compare files of the same kind and size"
        )
    lines, verdicts = [], {"SLOWER": 0, "faster": 0, "": 0}
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
        verdicts[verdict] += 1
        ratio = row["ms"] / was["ms"]
        lines.append(f"{row['case']:44} {row['provider']:14} {ratio:6.2f}x time  {verdict}".rstrip())
    slower, faster, alike = verdicts.values()
    lines.append(f"{slower} slower, {faster} faster, {alike} within their spread")
    return lines + unlike(before, after)


def unlike(before: dict, after: dict) -> list[str]:
    """How two files differ otherwise, and the warnings in them."""
    lines = []
    for name in ("commit", "versions"):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: before {before.get(name)}, after {after.get(name)}")
    for name, content in (("before", before), ("after", after)):
        lines += [f"warning in {name}: {warning}" for warning in content.get("warnings", ())]
    return lines


def main(config: CompareConfig) -> None:
    """`hotlap bench compare`."""
    print(printable("\n".join(compare(config))))

"""`hotlap bench compare BEFORE AFTER`: what got slower between two result files of one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from hotlap.bench import results
from hotlap.common import options


@dataclass(frozen=True)
class CompareConfig:
    """Say what got slower between two result files of one device."""

    before: tyro.conf.Positional[Path] = Path("before.json")
    """The older file."""
    after: tyro.conf.Positional[Path] = Path("after.json")
    """The newer file."""


def compare(config: CompareConfig) -> list[str]:
    """A line for each case that both files hold: the ratio of times, and SLOWER or faster beyond their
    spread; what was not measured the second time, with the reason; and what there is to know of both.

    ValueError where the files come from different devices, whose times say nothing about the code, or have no
    case in common.
    """
    before, after = results.load(config.before), results.load(config.after)
    if before["device"] != after["device"]:
        raise ValueError(
            f"{config.before} is of {before['device']}, {config.after} of {after['device']}; "
            "compare files of one device"
        )
    old = {(row["case"], row["provider"]): row for row in before["rows"] if row.get("ms") is not None}
    if not any((row["case"], row["provider"]) in old for row in after["rows"]):
        raise ValueError(
            f"{config.before} holds {before['kind']} and {config.after} {after['kind']}, without a timed "
            "case in common; compare files of one kind and size"
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
    """What else differs between two files, or should keep one from believing them."""
    lines = []
    for name in ("commit", "versions"):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name)}, then {after.get(name)}")
    for name, content in (("before", before), ("after", after)):
        lines += [f"warning of {name}: {warning}" for warning in content.get("warnings", ())]
    return lines


def main(arguments: list[str]) -> None:
    """`hotlap bench compare`."""
    print("\n".join(compare(options.parse(CompareConfig, arguments, command="bench compare"))))

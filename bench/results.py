"""Measurements on disk: JSON and CSV with the device, versions, commit and date, and a page of them all."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

from hotlap.bench.peaks import device_name, device_state
from hotlap.model.errors import DataError

RESULTS = Path("bench/results")  # in the current folder, which is the checkout


def environment(device: torch.device) -> dict[str, object]:
    """Where and with what a measurement is made."""
    versions = {}
    for package in ("torch", "triton", "flash-attn", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    state, warnings = device_state(device)
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "state": state,
        "warnings": warnings,
    }


def commit() -> str:
    """The commit of this checkout, with + where files differ from it; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_folder(device: torch.device) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def save(kind: str, rows: list[dict], folder: Path, device: torch.device, **more: object) -> Path:
    """Write kind.json and kind.csv, and return the path of the first. rows: `case` and `provider` name what
    was measured, the rest is what was found.

    Called again whenever there are more rows, so that a run that is cut off leaves what it has measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.json"
    content = {"kind": kind, **environment(device), **more, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    if folder.parent == RESULTS:
        write_page(RESULTS)
    return path


def load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["device"], content["rows"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no results at {path}; `hotlap bench kernels` writes some") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of results ({error!r})") from error
    return content


def table(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as a table in Markdown, numbers to four digits; by default with every column that has a value."""
    columns = columns or list(
        dict.fromkeys(n for row in rows for n, value in row.items() if value is not None)
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    cells = [[shown(row[name]) if name in row else "" for name in columns] for row in rows]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def as_line(row: dict) -> str:
    """A row for the log."""
    return "  ".join(f"{name} {shown(value)}" for name, value in row.items())


def shown(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(folder: Path) -> Path:
    """README.md of the results in a folder: each file's device, date and commit, and its rows."""
    lines = ["# Measurements", "", "Made by `hotlap bench`; each table is the JSON file that it names.", ""]
    for path in sorted(folder.rglob("*.json")):
        content = load(path)
        versions = ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
        lines += [
            f"## {content['device']}: {path.stem}",
            "",
            f"[{path.relative_to(folder)}]({path.relative_to(folder)}), {content.get('date', '')}, "
            f"commit {content.get('commit', '')}, {versions}",
            "",
            *(f"Warning: {warning}\n" for warning in content.get("warnings", ())),
            table(content["rows"]),
            "",
        ]
        if (picture := path.with_suffix(".png")).exists():
            lines += [f"![{path.stem}]({picture.relative_to(folder)})", ""]
    page = folder / "README.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page

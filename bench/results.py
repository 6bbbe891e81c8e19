"""Measurements on disk: JSON and CSV with the device, versions, commit and date, and a page of them all."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import subprocess
import tempfile
import traceback
from pathlib import Path

import torch

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.machine import circumstances, device_name, device_state, now

RESULTS = Path("bench/results")  # in the current folder, which is the checkout
TITLE = "# Measurements"  # first line of a page


@functools.cache
def commit() -> str:
    """The commit of this checkout, with + where files differ from it; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_folder(device: torch.device) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def open_file(kind: str, out: Path | None, device: torch.device, keep: bool = False) -> Path:
    """Where to save a kind of results, kind.json in a folder that can be written; asked before time is spent.

    keep: leave there what an earlier run has measured, to be continued; else that is renamed by its date.
    """
    folder = out or device_folder(device)
    check_folder(folder)
    path = folder / f"{kind}.json"
    return path if keep else rename_earlier(path)


def check_folder(folder: Path) -> None:
    """Make a folder, and raise an OSError where results cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"no results can be written to {folder} ({error.strerror}); name another --out"
        raise type(error)(reason) from None


def rename_earlier(path: Path) -> Path:
    """Rename the results of an earlier run by their date, and return where new ones go."""
    if path.exists():
        date = re.sub(r"[^0-9]+", "-", str(load(path).get("date", "")))
        path.replace(path.with_stem(f"{path.stem}-{date.strip('-')}"))
    return path


def write_traceback(folder: Path, what: str) -> None:
    """Keep the whole of an error that is being handled, of which a row has room for a line."""
    with open(folder / "errors.txt", "a", encoding="utf-8") as file:
        file.write(f"{now()} {what}\n{traceback.format_exc()}\n")


def save(path: Path, rows: list[dict], device: torch.device, **more: object) -> None:
    """Write path, its .csv, and the page of the repository's results. rows: `case` and `provider` name what
    was measured, the rest is what was found.

    Called again whenever there are more rows, so that a run that is cut off leaves what it has measured.
    """
    state, warnings = device_state(device)
    content = {
        "kind": path.stem,
        **circumstances(device),
        "commit": commit(),
        "state": state,
        "warnings": warnings,
        **more,
        "rows": rows,
    }
    files.write(path, json.dumps(content, indent=1) + "\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    files.write(path.with_suffix(".csv"), text.getvalue())
    if path.parent.parent == RESULTS:
        write_page(RESULTS)


def load(path: Path, device: torch.device | None = None) -> dict:
    """Results from disk. DataError where they are none, ValueError where they are not of the device."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["kind"], content["device"], [(row["case"], row["provider"]) for row in content["rows"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"no results at {path}; `hotlap bench kernels` writes some") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of results ({error!r})") from error
    if device and content["device"] != device_name(device):
        raise ValueError(
            f"{path} is of {content['device']}, and this is {device_name(device)}; name another --out"
        )
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


def write_page(folder: Path) -> Path | None:
    """README.md of the results in a folder: each file's device, date and commit, and its rows. None where
    there is another README.md, which is left as it is.
    """
    page = folder / "README.md"
    if page.exists() and not page.read_text(encoding="utf-8").startswith(TITLE):
        log.warning("%s is not a page of results, and is left as it is", page)
        return None
    lines = [TITLE, "", "Made by `hotlap bench`; each table is the JSON file that it names.", ""]
    for path in sorted(folder.rglob("*.json")):
        try:
            content = load(path)
        except DataError:
            continue
        if content["kind"] != path.stem:
            continue  # an earlier run's
        with_ = ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
        lines += [
            f"## {content['device']}: {path.stem}",
            "",
            f"[{path.relative_to(folder)}]({path.relative_to(folder)}), {content.get('date', '')}, "
            f"commit {content.get('commit', '')}, {with_}",
            "",
            *(f"Warning: {warning}\n" for warning in content.get("warnings", ())),
            table(content["rows"]),
            "",
        ]
        if (picture := path.with_suffix(".png")).exists():
            lines += [f"![{path.stem}]({picture.relative_to(folder)})", ""]
    files.write(page, "\n".join(lines))
    return page

"""Results on disk: JSON and CSV with device, versions, commit and date, and a page that shows them all."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
import traceback
from itertools import chain, count
from pathlib import Path

import torch

from hotlap.common import files
from hotlap.common.code import commit
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.machine import circumstances, device_name, device_state, now

RESULTS = Path("bench/results")  # in the current folder, usually the checkout
TITLE = "# Measurements"  # first line of the page


def device_folder(device: torch.device) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def open_file(kind: str, out: Path | None, device: torch.device, keep: bool = False) -> Path:
    """The path of a new kind.json, in a folder that is known to be writable.

    keep: leave an earlier file in place, to resume it; else it is renamed by its date.
    """
    folder = out or device_folder(device)
    check_folder(folder)
    path = folder / f"{kind}.json"
    return path if keep else rename_earlier(path)


def check_folder(folder: Path) -> None:
    """Make a folder, and raise an OSError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"cannot write results to {folder} ({error.strerror}); name another --out"
        raise type(error)(reason) from None


def rename_earlier(path: Path) -> Path:
    """Rename the results of an earlier run by their date, and return the path for new ones. Dates end with
    the minute, so a second run of the same minute also gets a number.
    """
    if path.exists():
        date = re.sub(r"[^0-9]+", "-", str(load(path).get("date", ""))).strip("-")
        stem = f"{path.stem}-{date}"
        names = chain([stem], (f"{stem}-{number}" for number in count(2)))
        path.rename(next(name for name in map(path.with_stem, names) if not name.exists()))
    return path


def write_traceback(folder: Path, what: str) -> None:
    """Append the traceback of the error being handled to errors.txt; a row only has room for one line."""
    files.append(folder / "errors.txt", f"{now()} {what}\n{traceback.format_exc()}\n")


def save(path: Path, rows: list[dict], device: torch.device, **more: object) -> None:
    """Write path, its .csv, and the page of all results. rows: `case` and `provider` say what was measured.

    Call it again whenever there are more rows, so that a run that is cut off leaves its results.
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
    files.write_object(path, content)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    files.write(path.with_suffix(".csv"), text.getvalue())
    if path.parent.parent == RESULTS:
        write_page(RESULTS)


def load(path: Path, device: torch.device | None = None) -> dict:
    """Read a result file. DataError if it is none, ValueError if it is from another device."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["kind"], content["device"], [(row["case"], row["provider"]) for row in content["rows"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"no results at {path}; `hotlap bench kernels` writes some") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of results ({error!r})") from error
    if device and content["device"] != device_name(device):
        raise ValueError(
            f"{path} is from {content['device']}, and this is {device_name(device)}; name another --out"
        )
    return content


def table(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as a Markdown table, numbers to four digits. columns: all that have a value by default."""
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
    """Write README.md for the results in a folder: each file's device, date, commit and rows. None if the
    folder has another README.md, which is kept.
    """
    page = folder / "README.md"
    if page.exists() and not page.read_text(encoding="utf-8").startswith(TITLE):
        log.warning("%s is not a page of results; left unchanged", page)
        return None
    lines = [TITLE, "", "Written by `hotlap bench`. Each table shows the JSON file that it links to.", ""]
    for path in sorted(folder.rglob("*.json")):
        try:
            content = load(path)
        except DataError:
            continue
        if content["kind"] != path.stem:
            continue  # of an earlier run
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

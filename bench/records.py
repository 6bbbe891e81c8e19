"""`hotlap bench records`: the table of records, a page and a picture made from the files in bench/records.

A file is added when every claim of its record holds, with its runs beside it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hotlap.bench.config import RecordsConfig
from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.plots import new_figure, save_figure
from hotlap.common.terminal import printable
from hotlap.train.speedruns.config import VerifyConfig
from hotlap.train.speedruns.record_claims import lacks, several_runs, unchanged
from hotlap.train.speedruns.record_file import read_record
from hotlap.train.speedruns.verify import verify

PAGE, PICTURE = "README.md", "records.png"
TITLE = "# Records"
INTRODUCTION = """\
The lowest bits per byte after five minutes of training, by `hotlap speedrun minutes`: [the rules, and how to
add a row](../../docs/records.md). `hotlap bench records` writes this page from the files that it links to.

Rows compare on one device and one validation text: `pydocs`, for example, is the documentation of one version
of Python. ± is the 95 % interval of the mean. TFLOP/s (of a matmul) and GB/s (of a copy) are measured."""
HEAD = (
    "| device | bits per byte | runs | seconds | tokens | TFLOP/s | GB/s | date | commit | record |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)

Records = dict[str, dict]  # by the names of their files


def read_records(folder: Path) -> Records:
    """The records in a folder. DataError for one that is damaged, was edited, or is no row."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        try:
            unchanged(record)
            several_runs(record)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if lacking := lacks(record["minutes"], len(record["runs"])):
            raise DataError(f"{path} is no row of the table: {lacking}")
        found[path.name] = record
    return found


def by_corpus(records: Records) -> dict[str, Records]:
    """The records of each corpus, told apart by name and validation text; the best of each device first."""
    found: dict[str, Records] = {}
    order = sorted(records.items(), key=lambda row: (corpus_of(row[1]), device_of(row[1]), row[1]["mean"]))
    for name, record in order:
        found.setdefault(corpus_of(record), {})[name] = record
    return found


def corpus_of(record: dict) -> str:
    return f"{record['corpus']}, validation text {record['data']['validation_sha256'][:8]}"


def device_of(record: dict) -> str:
    """The class that a record competes in: the device, with its threads or the number of them."""
    run = record["runs"][0]
    return (f"{run['ranks']} x " if run["ranks"] > 1 else "") + run["device"]


def ceiling_of(record: dict, name: str) -> float:
    """The device's measured ceiling: the median over the runs, of all ranks."""
    found = sorted(run[when][name] for run in record["runs"] for when in ("before", "after"))
    return found[len(found) // 2] * record["runs"][0]["ranks"]


def page(records: Records, picture: bool) -> str:
    lines = [TITLE, "", INTRODUCTION, ""]
    if not records:
        lines += ["There is no record yet.", ""]
    if picture:
        lines += [f"![bits per byte over the measured speed of the device]({PICTURE})", ""]
    for corpus, rows in by_corpus(records).items():
        lines += [f"## {cell(corpus)}", "", HEAD, *(row(name, record) for name, record in rows.items()), ""]
    return "\n".join(lines)


def row(name: str, record: dict) -> str:
    runs, half = record["runs"], (record["interval"][1] - record["interval"][0]) / 2
    seconds, tokens = (sum(run[what] for run in runs) / len(runs) for what in ("seconds", "tokens"))
    cells = (
        device_of(record), f"{record['mean']:.4f} ± {half:.4f}", str(len(runs)), f"{seconds:.0f}",
        f"{tokens / 1e6:.2f}M", f"{ceiling_of(record, 'matmul') / 1e12:.3g}",
        f"{ceiling_of(record, 'copy') / 1e9:.3g}", record["date"][:10],
        record["code"]["commit"] or "installed",
    )  # fmt: skip
    return "| " + " | ".join(map(cell, cells)) + f" | [{name}]({name}) |"


def cell(text: str) -> str:
    """Text that stays in its cell: a record is somebody else's."""
    return re.sub(r"([|<>\[\]`\\])", r"\\\1", " ".join(printable(text).split()))


def draw(records: Records, path: Path) -> bool:
    """Draw bits per byte over the measured FLOP/s, a panel for each corpus. False without records or
    matplotlib.
    """
    corpora = by_corpus(records)
    figure = new_figure(figsize=(4.5 * max(1, len(corpora)), 4)) if corpora else None
    if figure is None:
        return False
    panels = figure.subplots(1, len(corpora), squeeze=False)[0]
    for axes, (corpus, rows) in zip(panels, corpora.items(), strict=True):
        for i, device in enumerate(dict.fromkeys(map(device_of, rows.values()))):
            own = [record for record in rows.values() if device_of(record) == device]
            axes.errorbar(
                [ceiling_of(record, "matmul") / 1e12 for record in own], [record["mean"] for record in own],
                [record["mean"] - record["interval"][0] for record in own],
                fmt="o", ms=4, capsize=3, color=f"C{i}", label=device[:60],
            )  # fmt: skip
        axes.set(title=corpus, xscale="log", xlabel="TFLOP/s of a matmul, measured", ylabel="bits per byte")
        axes.title.set_fontsize(8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    save_figure(figure, path, of=content_of(records))
    return True


def content_of(records: Records) -> str:
    """What the picture says that it shows, so that a stale one is found."""
    return hashlib.sha256("".join(record["sha256"] for record in records.values()).encode()).hexdigest()


def add(path: Path, folder: Path) -> Path:
    """Verify a record, and copy it into the folder. ValueError if it is no row, or a claim is left open."""
    record = read_record(path)
    if lacking := lacks(record["minutes"], len(record["runs"])):
        raise ValueError(f"{path} is no row of the table: {lacking}")
    record, left = verify(VerifyConfig(path))
    if left:
        raise ValueError(f"{path} is not added: {len(left)} of its claims cannot be checked here ({left[0]})")
    device = re.sub(r"[^a-z0-9]+", "-", device_of(record).lower()).strip("-")
    date = re.sub(r"[^0-9]+", "-", record["date"]).strip("-")
    target = folder / f"{record['corpus']}-{device[:60]}-{date}.json"
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_object(target, record)
    return target


def main(config: RecordsConfig) -> None:
    """`hotlap bench records`."""
    if not config.add and not config.out.is_dir():
        raise FileNotFoundError(f"no folder {config.out}; start in the checkout, or give --out")
    added = add(config.add, config.out) if config.add else None
    records = read_records(config.out)
    picture = draw(records, config.out / PICTURE)
    files.write(config.out / PAGE, page(records, picture))
    many = "1 record" if len(records) == 1 else f"{len(records)} records"
    print(printable(f"{config.out / PAGE}: {many}" + (f", with {added}" if added else "")))

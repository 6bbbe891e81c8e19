"""Files of datasets on the Hugging Face hub: downloaded once, and checked at every call.

huggingface_hub downloads into a staging folder, because it checks sizes alone and replaces files of the same
name. A file moves into place once its size, its sha256 (pinned, or stated by the hub) and its format are
verified. `hub.json` beside the data records size and sha256. HF_ENDPOINT names a mirror, HF_TOKEN an account.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hotlap.common.download import (
    Content,
    check_content,
    data_package,
    locked,
    persistent,
    require_free_space,
)
from hotlap.common.errors import DataError
from hotlap.common.files import file_sha256, write_object
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.train.data.datasets import Dataset

RECORD, STAGING = "hub.json", ".hub"
AT_ONCE = 4  # files downloaded or hashed in parallel


@dataclass(frozen=True)
class DownloadPlan:
    """The files that a download will fetch, and the bytes already in the folder."""

    folder: Path
    missing: dict[str, Content]
    bytes_there: int

    @property
    def bytes_missing(self) -> int:
        return sum(content.bytes for content in self.missing.values())


def plan_download(dataset: Dataset, folder: Path, names: Iterable[str]) -> DownloadPlan:
    """What `download` will fetch. Asks the hub about the files that are not in the folder."""
    there = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    missing = expected(dataset, folder, [name for name in names if name not in there])
    return DownloadPlan(folder, missing, sum(there.values()))


def download(dataset: Dataset, folder: Path, names: Sequence[str]) -> None:
    """Download the files of a dataset that are not in the folder yet, and check all of them. Needs no network
    if none is missing; called again, it resumes with those that are.

    A downloaded file that has changed since is removed and downloaded again. DataError: a file that the hub
    sends, or one that the user put there, is not the dataset's. OSError: the network or the disk.
    """
    if not sound(dataset, folder, names):
        with locked(folder):
            if not sound(dataset, folder, names):
                adopt(dataset, folder, [n for n in names if (folder / n).exists()])
                fetch(dataset, folder, plan_download(dataset, folder, names).missing)


def sound(dataset: Dataset, folder: Path, names: Sequence[str]) -> bool:
    """Whether all files exist and are as recorded. Files that have changed are removed."""
    from tqdm import tqdm

    record = read_record(dataset, folder)
    known = [name for name in names if name in record and (folder / name).is_file()]
    damaged = []

    def check(name: str) -> None:
        try:
            check_content(folder / name, record[name])
        except DataError as error:
            damaged.append(name)
            (folder / name).unlink()
            log.warning("%s; removed, downloading it again", error)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        checks = pool.map(check, known)
        for _ in tqdm(checks, f"checking {folder}", len(known), unit="file", disable=None, leave=False):
            pass
    return len(known) - len(damaged) == len(names)


def adopt(dataset: Dataset, folder: Path, names: list[str]) -> None:
    """Record files that hotlap did not download. DataError names one that differs from the hub's; it is
    kept.
    """
    record = read_record(dataset, folder)
    for name, content in expected(dataset, folder, [n for n in names if n not in record]).items():
        try:
            check_content(folder / name, content)
            dataset.check(folder / name)
        except DataError as error:
            raise DataError(f"{error}; hotlap did not download it: move it away") from error
        record[name] = Content(content.bytes, content.sha256 or file_sha256(folder / name))
        write_record(dataset, folder, record)


def fetch(dataset: Dataset, folder: Path, missing: dict[str, Content]) -> None:
    """Download files into the staging folder, check them, and move each to its place."""
    from tqdm import tqdm

    total, done, record = sum(c.bytes for c in missing.values()), 0, read_record(dataset, folder)
    staging, stop, pool = folder / STAGING, threading.Event(), ThreadPoolExecutor(AT_ONCE)
    for part in staging.rglob("*.incomplete"):  # a killed process's; not resumed
        part.unlink()
    require_free_space(folder, total)
    log.info("%s: %d files, %.2f GB, to %s", dataset.repo, len(missing), total / 1e9, folder)
    waiting = {pool.submit(fetch_file, dataset, name, c, staging, stop): name for name, c in missing.items()}
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=printable(folder.name), disable=None) as bar:
            while waiting:
                for ready in wait(waiting, 0.5, FIRST_COMPLETED).done:
                    name, sha256 = waiting.pop(ready), ready.result()
                    if (folder / name).exists():
                        raise FileExistsError(f"{folder / name} appeared during the download; try again")
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (staging / name).rename(folder / name)
                    record[name] = Content(missing[name].bytes, sha256)
                    write_record(dataset, folder, record)
                    done += missing[name].bytes
                    if bar.disable:
                        log.info("%s: %s complete, %.0f %%", folder, name, 100 * done / total)
                bar.n = max(bar.n, min(total, done + folder_bytes(staging)))
                bar.refresh()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    shutil.rmtree(staging, ignore_errors=True)


def fetch_file(dataset: Dataset, name: str, content: Content, staging: Path, stop: threading.Event) -> str:
    """Download a file into the staging folder, check it, and return its sha256."""

    def once() -> str:
        path = Path(
            ask_hub(
                "hf_hub_download", dataset.repo, name, repo_type="dataset", revision=dataset.revision,
                local_dir=staging, endpoint=endpoint(), tqdm_class=watched(name, content.bytes, stop),
            )
        )  # fmt: skip
        try:
            sha256 = check_content(path, content)
            dataset.check(path)
        except DataError as error:
            path.unlink()
            raise DataError(f"{error}; removed what {endpoint()} sent") from error
        return sha256

    return persistent(once, f"{name} of {dataset.repo}", endpoint(), stop)


def watched(name: str, limit: int, stop: threading.Event) -> type:
    """A silent progress bar for huggingface_hub that ends a download by an exception: when `stop` is set, or
    if it goes far beyond `limit` bytes.
    """
    from tqdm import tqdm

    class Watched(tqdm):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings | {"disable": True})
            self.received = 0

        def update(self, n=1):
            self.received += n
            if stop.is_set():
                raise InterruptedError(f"{name}: stopped")
            if self.received > 4 * limit:  # the hub's own protocol, Xet, may send more than the file has
                raise DataError(f"{name}: received far more than its {limit:,} bytes")

    return Watched


def expected(dataset: Dataset, folder: Path, names: list[str]) -> dict[str, Content]:
    """Size and sha256 of each file, as the hub states them. DataError if those pinned or recorded differ."""
    known = read_record(dataset, folder) | dataset.pinned

    def ask(name: str) -> Content:
        url = ask_hub(
            "hf_hub_url", dataset.repo, name, repo_type="dataset", revision=dataset.revision,
            endpoint=endpoint(),
        )  # fmt: skip
        facts = persistent(
            partial(ask_hub, "get_hf_file_metadata", url), f"{name} of {dataset.repo}", endpoint()
        )
        if facts.size is None or facts.commit_hash is None:
            raise DataError(f"{endpoint()} is no hub: it states no size for {name}; check HF_ENDPOINT")
        is_sha256 = re.fullmatch("[0-9a-f]{64}", facts.etag or "")  # else git's hash of a small file
        stated = Content(facts.size, facts.etag if is_sha256 else None)
        needed = known.get(name, stated)
        if stated.bytes != needed.bytes or stated.sha256 not in (None, needed.sha256):
            raise DataError(f"{endpoint()} has {name} with {stated}, not {needed}; check HF_ENDPOINT")
        return needed

    found = {name: ask(name) for name in names[:1]}  # alone, so that a missing network is one error
    with ThreadPoolExecutor(2 * AT_ONCE) as pool:
        return found | dict(zip(names[1:], pool.map(ask, names[1:]), strict=True))


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def ask_hub(function: str, *arguments, **settings):
    """Call a function of huggingface_hub. A connection that fails raises a ConnectionError."""
    hub, errors = data_package("huggingface_hub"), data_package("huggingface_hub.errors")
    try:
        return getattr(hub, function)(*arguments, **settings)
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(
            f"HF_HUB_OFFLINE is set, but {arguments[-1]} has to be downloaded; unset it"
        ) from error
    except errors.HTTPError as error:  # of its HTTP library
        if isinstance(error, OSError):
            raise
        raise ConnectionError(str(error) or type(error).__name__) from error


def read_record(dataset: Dataset, folder: Path) -> dict[str, Content]:
    """The files in hub.json. DataError if it is damaged, or another dataset's."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        source = fields["repo"], fields["revision"]
        files = {name: Content(int(f["bytes"]), str(f["sha256"])) for name, f in fields["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it to check the files again") from error
    if source != (dataset.repo, dataset.revision):
        raise DataError(f"{path} is of {' at '.join(source)}, not of {dataset.repo} at {dataset.revision}; "
                        "name another folder")  # fmt: skip
    return files


def write_record(dataset: Dataset, folder: Path, record: dict[str, Content]) -> None:
    files = {name: content._asdict() for name, content in sorted(record.items())}
    fields = {"repo": dataset.repo, "revision": dataset.revision, "files": files}
    write_object(folder / RECORD, fields)


def folder_bytes(folder: Path) -> int:
    """Total size of the files in a folder; some may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total

"""Downloads from the hub, against a server on this machine that speaks its protocol."""

import dataclasses
import errno
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest
from helpers.hub_server import HubServer

pytest.importorskip("huggingface_hub")
parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402

from hotlap.common.download import Content  # noqa: E402
from hotlap.common.errors import DataError  # noqa: E402
from hotlap.train.data import hub  # noqa: E402
from hotlap.train.data.datasets import CLIMBMIX, FINEWEB  # noqa: E402

VALIDATION, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000001.bin"
SHARDS = dataclasses.replace(FINEWEB, pinned={})
NAMES = SHARDS.names(2)


def shard(tokens: int, seed: int) -> bytes:
    ids = np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2")
    return struct.pack("<256i", 20240520, 1, tokens, *[0] * 253) + ids.tobytes()


def content(raw: bytes) -> Content:
    return Content(len(raw), hashlib.sha256(raw).hexdigest())


@pytest.fixture
def server(hub_server) -> HubServer:
    """The hub, with three shards."""
    for seed, name in enumerate(NAMES):
        hub_server.add(SHARDS, name, shard(20_000 + seed, seed))
    return hub_server


def original(server: HubServer, name: str) -> bytes:
    return server.files[SHARDS.repo, SHARDS.revision, name]


def left(folder) -> list[str]:
    """The files in a folder but for the lock."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name[:2] != ".d")


def test_the_files_are_the_hub_s_and_are_recorded(server, tmp_path):
    hub.download(SHARDS, tmp_path / "data", NAMES)
    assert left(tmp_path / "data") == sorted([*NAMES, "hub.json"])
    record = json.loads((tmp_path / "data" / "hub.json").read_text())
    assert (record["repo"], record["revision"]) == (SHARDS.repo, SHARDS.revision)
    for name in NAMES:
        assert (tmp_path / "data" / name).read_bytes() == original(server, name)
        assert record["files"][name] == content(original(server, name))._asdict()
    sent = {(method, token) for method, name, _, token in server.requests if name in NAMES}
    assert sent == {("HEAD", "Bearer hf_of_a_test"), ("GET", None)}  # the storage is another host's


def test_a_second_call_needs_no_network_and_one_for_more_fetches_only_those(server, tmp_path, monkeypatch):
    hub.download(SHARDS, tmp_path, NAMES[:2])
    server.requests.clear()
    hub.download(SHARDS, tmp_path, NAMES)
    assert server.fetched() == {NAMES[2]: 1}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    hub.download(SHARDS, tmp_path, NAMES)
    assert hub.plan_download(SHARDS, tmp_path, NAMES).missing == {}


def test_a_plan_says_what_is_missing_and_fetches_nothing(server, tmp_path):
    (tmp_path / NAMES[0]).write_bytes(original(server, NAMES[0]))
    plan = hub.plan_download(SHARDS, tmp_path, NAMES)
    assert plan.missing == {name: content(original(server, name)) for name in NAMES[1:]}
    assert plan.bytes_there == len(original(server, NAMES[0]))
    assert plan.bytes_missing == sum(len(original(server, name)) for name in NAMES[1:])
    assert not server.fetched()


@pytest.mark.parametrize("fault", [429, 500, 503, "drop", "short", "flip", "html", "long"])
def test_a_fault_that_passes_is_outlived(server, tmp_path, fault):
    server.fail(TRAIN, fault)
    hub.download(SHARDS, tmp_path, NAMES)
    assert (tmp_path / TRAIN).read_bytes() == original(server, TRAIN)
    assert server.fetched()[TRAIN] > 1


def test_a_server_that_falls_silent_is_outlived(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.fail(TRAIN, "stall")
    hub.download(SHARDS, tmp_path, NAMES)
    assert (tmp_path / TRAIN).read_bytes() == original(server, TRAIN)


def test_a_dropped_connection_goes_on_where_it_was(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.fail(TRAIN, "drop")
    hub.download(SHARDS, tmp_path, [TRAIN])
    asked = [where for method, name, where, _ in server.requests if (method, name) == ("GET", TRAIN)]
    assert asked[0] is None and int(asked[1].removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_when_asked_is_outlived(server, tmp_path, status):
    server.head_faults[TRAIN] = deque([status])
    hub.download(SHARDS, tmp_path, [TRAIN])
    assert (tmp_path / TRAIN).exists()


@pytest.mark.parametrize("fault", ["flip", "html", "long", 503])
def test_a_fault_that_stays_is_an_error_and_no_file_appears(server, tmp_path, fault):
    server.fail(TRAIN, *[fault] * 100)
    with pytest.raises((DataError, OSError), match=TRAIN):
        hub.download(SHARDS, tmp_path, NAMES)
    assert not (tmp_path / TRAIN).exists()
    server.fail(TRAIN)
    hub.download(SHARDS, tmp_path, NAMES)
    assert left(tmp_path) == sorted([*NAMES, "hub.json"])


def test_what_is_pinned_is_what_counts_and_not_what_the_hub_says(server, tmp_path):
    good, forged = original(server, TRAIN), shard(20_001, 99)
    pinned = dataclasses.replace(SHARDS, pinned={TRAIN: content(good)})
    server.add(SHARDS, TRAIN, forged)
    with pytest.raises(DataError, match=f"{TRAIN} with .* not .*{content(good).sha256[:12]}.*HF_ENDPOINT"):
        hub.download(pinned, tmp_path, [TRAIN])
    server.stated[TRAIN] = content(good)  # it lies
    with pytest.raises(DataError, match="sha256"):
        hub.download(pinned, tmp_path, [TRAIN])
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"<html>", "less than a shard's header"),
        (shard(100, 0)[:-2], "its header says 100 tokens"),
        (struct.pack("<256i", 1, 1, 1, *[0] * 253) + b"00", "magic 1"),
        (struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + struct.pack("<H", 50257), "token id 50257"),
    ],
)
def test_a_file_that_is_as_the_hub_has_it_but_no_shard_is_refused(server, tmp_path, raw, says):
    server.add(SHARDS, TRAIN, raw)
    with pytest.raises(DataError, match=says):
        hub.download(SHARDS, tmp_path, [TRAIN])
    assert not (tmp_path / TRAIN).exists()


def test_a_download_that_has_changed_is_named_removed_and_fetched_again(server, tmp_path, caplog):
    hub.download(SHARDS, tmp_path, NAMES)
    raw = bytearray(original(server, TRAIN))
    raw[5000] ^= 4
    (tmp_path / TRAIN).write_bytes(raw)
    (tmp_path / NAMES[2]).write_bytes(raw[:-1])
    hub.download(SHARDS, tmp_path, NAMES)
    assert all((tmp_path / name).read_bytes() == original(server, name) for name in NAMES)
    assert f"{tmp_path / TRAIN} has" in caplog.text and "removed" in caplog.text
    assert server.fetched() == {VALIDATION: 1, TRAIN: 2, NAMES[2]: 2}


def test_a_user_s_file_is_used_where_it_is_right_and_never_touched_where_it_is_not(server, tmp_path):
    (tmp_path / TRAIN).write_bytes(original(server, TRAIN))
    hub.download(SHARDS, tmp_path, NAMES)
    assert TRAIN not in server.fetched()
    other = tmp_path / "other"
    other.mkdir()
    (other / TRAIN).write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"{other / TRAIN} has 4 bytes.*move it away"):
        hub.download(SHARDS, other, NAMES)
    assert (other / TRAIN).read_bytes() == b"mine"


def test_a_folder_of_another_dataset_or_a_broken_record_is_refused(server, tmp_path):
    hub.download(SHARDS, tmp_path, [TRAIN])
    with pytest.raises(DataError, match=r"hub\.json is of kjj0.*name another folder"):
        hub.download(CLIMBMIX, tmp_path, CLIMBMIX.names(1))
    (tmp_path / "hub.json").write_text('{"repo": 3')
    with pytest.raises(DataError, match=r"hub\.json is damaged"):
        hub.download(SHARDS, tmp_path, [TRAIN])


def test_nothing_is_fetched_where_the_disk_is_too_small(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes.* only 1,000 are free"):
        hub.download(SHARDS, tmp_path, NAMES)
    assert not server.fetched()


def test_a_disk_that_fills_up_is_named_and_what_is_whole_is_kept(server, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    real = file_download.http_get

    def full(url, temp_file, **settings):
        if TRAIN in url:
            while not (tmp_path / VALIDATION).exists():
                threading.Event().wait(0.01)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(url, temp_file, **settings)

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match=f"the disk is full, at {TRAIN}"):
        hub.download(SHARDS, tmp_path, [VALIDATION, TRAIN])
    monkeypatch.setattr(file_download, "http_get", real)
    hub.download(SHARDS, tmp_path, [VALIDATION, TRAIN])
    assert server.fetched() == {VALIDATION: 1, TRAIN: 1}


def test_a_killed_download_goes_on_with_what_is_missing(server, tmp_path):
    """The process that downloads is killed while the server keeps it waiting for the second file."""
    server.fail(TRAIN, "stall")
    code = f"""
import dataclasses
from pathlib import Path
from hotlap.train.data import datasets, hub
shards = dataclasses.replace(datasets.FINEWEB, pinned={{}})
hub.download(shards, Path({str(tmp_path)!r}), {[VALIDATION, TRAIN]})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    parts = []
    while not (parts and (tmp_path / VALIDATION).exists()) and process.poll() is None:
        threading.Event().wait(0.05)
        parts = list(tmp_path.rglob("*.incomplete"))
    process.kill()
    process.wait()
    assert parts and not (tmp_path / TRAIN).exists()
    hub.download(SHARDS, tmp_path, NAMES)
    assert left(tmp_path) == sorted([*NAMES, "hub.json"])
    assert server.fetched() == {VALIDATION: 1, TRAIN: 2, NAMES[2]: 1}


def test_a_missing_file_a_closed_door_and_no_network_are_told_apart(server, tmp_path, monkeypatch):
    absent = SHARDS.names(3)[-1]
    with pytest.raises(OSError, match=f"could not download {absent} of .* from {server.url} .*not there"):
        hub.download(SHARDS, tmp_path, [absent])
    assert [name for _, name, *_ in server.requests].count(absent) == 1  # no use in asking again
    server.head_faults[TRAIN] = deque([401])
    with pytest.raises(OSError, match="HF_TOKEN"):
        hub.download(SHARDS, tmp_path, [TRAIN])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        OSError, match=f"could not download {TRAIN} .*127.0.0.1:1.*check the network"
    ) as caught:
        hub.download(SHARDS, tmp_path, [TRAIN])
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line_that_names_the_extra(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'hotlap\[data\]'"):
        hub.download(SHARDS, tmp_path, NAMES)


@pytest.mark.parametrize("shards", [0, 104])
def test_more_shards_than_there_are(shards):
    with pytest.raises(ValueError, match="1 to 103"):
        FINEWEB.names(shards)


def test_the_files_of_a_choice_of_shards():
    assert FINEWEB.names(103)[-1] == "fineweb_train_000103.bin"
    assert CLIMBMIX.names(2) == ["shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"]
    assert set(FINEWEB.pinned) == {VALIDATION, TRAIN}
    assert {c.bytes for c in FINEWEB.pinned.values()} == {1024 + 2 * 100_000_000}


def test_parquet_from_the_hub_needs_a_column_of_text(server, tmp_path):
    name = CLIMBMIX.names(1)[1]
    for column, refused in (("text", False), ("body", True)):
        parquet.write_table(pyarrow.table({column: ["a", "b"]}), tmp_path / "made.parquet")
        server.add(CLIMBMIX, name, (tmp_path / "made.parquet").read_bytes())
        if refused:
            with pytest.raises(DataError, match="column `text`"):
                hub.download(CLIMBMIX, tmp_path / column, [name])
        else:
            hub.download(CLIMBMIX, tmp_path / column, [name])
    server.add(CLIMBMIX, name, (tmp_path / "made.parquet").read_bytes()[:-8])
    with pytest.raises(DataError, match="not a parquet file"):
        hub.download(CLIMBMIX, tmp_path / "cut", [name])

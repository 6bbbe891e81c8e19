"""Which files a path, a folder or a pattern names, and what is said about the rest."""

import logging
import os
import socket

import pytest

from hotlap.train.data.text_files import text_files


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")


def names(data, folder):
    return [str(path.relative_to(folder)) for path in text_files(str(data))]


def test_files_are_found_by_path_folder_and_pattern_in_order(tmp_path):
    write_files(tmp_path, "b.txt", "a.md", "sub/c.py", "sub/ignored.png", "D.TXT")
    assert names(tmp_path, tmp_path) == ["D.TXT", "a.md", "b.txt", "sub/c.py"]
    assert names(f"{tmp_path}/*.txt", tmp_path) == ["b.txt"]
    assert names(f"{tmp_path}/**/c.*", tmp_path) == ["sub/c.py"]
    assert names(tmp_path / "sub/ignored.png", tmp_path) == ["sub/ignored.png"]


@pytest.mark.parametrize(
    "name", ["notes[1].txt", "a*b.txt", "what?.txt", "~", "with space.txt", "é.txt", "[!].md"]
)
def test_a_path_that_exists_is_that_file_whatever_its_characters(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, name, "notes1.txt", "ab.txt", "aXb.txt", "whatX.txt", "i.md")
    assert [str(path) for path in text_files(name)] == [name]


def test_a_tilde_is_the_home_folder_and_nothing_is_not_this_folder(tmp_path, monkeypatch):
    write_files(tmp_path, "books/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/books", tmp_path) == names("~/books/*.txt", tmp_path) == ["books/a.txt"]
    with pytest.raises(ValueError, match="name of the data is empty"):
        text_files("")


def test_what_is_left_out_of_a_folder_is_counted(tmp_path, caplog):
    write_files(
        tmp_path, "a.txt", "x.txt/inner.md", "b.png", "c.csv", "d.csv", "README", ".hidden.txt", ".git/e.py"
    )
    os.symlink("gone.txt", tmp_path / "broken.txt")
    os.symlink("loop.txt", tmp_path / "loop.txt")
    os.symlink("a.txt", tmp_path / "z.txt")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    os.symlink("..", tmp_path / "x.txt" / "up")
    os.mkfifo(tmp_path / "pipe.txt")
    with caplog.at_level(logging.INFO, "hotlap"):
        assert names(tmp_path, tmp_path) == ["a.txt", "x.txt/inner.md"]
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: 2 text files; left out ")
    assert set(line.split("left out ")[1].split("; ")) == {
        "hidden files and folders: 2", "files with the ending .png: 1", "files with the ending .csv: 2",
        "files without an ending: 1", "broken links: 2", "pipes, sockets or devices: 1",
        "further names of the same files: 2", "links to folders that are read already: 1",
    }  # fmt: skip


def test_a_folder_behind_a_link_is_read(tmp_path):
    write_files(tmp_path, "elsewhere/a.txt", "corpus/b.txt")
    os.symlink("../elsewhere", tmp_path / "corpus" / "more")
    assert names(tmp_path / "corpus", tmp_path) == ["corpus/b.txt", "corpus/more/a.txt"]


def test_what_a_pattern_matches_beside_files_is_counted(tmp_path, caplog):
    write_files(tmp_path, "a.txt", "sub/b.txt")
    os.symlink("a.txt", tmp_path / "b.txt")
    with caplog.at_level(logging.INFO, "hotlap"):
        assert names(f"{tmp_path}/*", tmp_path) == ["a.txt"]
        assert names(f"{tmp_path}/**", tmp_path) == ["a.txt", "sub/b.txt"]
    assert caplog.messages == [
        f"{tmp_path}/*: 1 text files; left out further names of the same files: 1; folders: 1",
        f"{tmp_path}/**: 2 text files; left out further names of the same files: 1",
    ]


def test_what_cannot_be_read_as_a_file_is_named(tmp_path, monkeypatch):
    os.symlink("gone.txt", tmp_path / "broken.txt")
    with pytest.raises(FileNotFoundError, match=r"broken\.txt is a link to gone\.txt"):
        text_files(str(tmp_path / "broken.txt"))
    with pytest.raises(FileNotFoundError, match=r"no text files in .* \(broken links: 1\)"):
        text_files(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is a pipe, socket or device"):
        text_files(str(tmp_path / "pipe.txt"))
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock.txt")
        with pytest.raises(ValueError, match=r"sock\.txt is a pipe, socket or device"):
            text_files("sock.txt")


def test_a_folder_that_cannot_be_listed_stops_instead_of_being_skipped(tmp_path, monkeypatch):
    write_files(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def denied(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="locked"):
        text_files(str(tmp_path))

"""The table of records is what its files say, whether there is none, one or many."""

import json
from pathlib import Path

import pytest
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE, assert_error
from helpers.records import invented_record, rewritten

from hotlap.bench import records
from hotlap.cli import main
from hotlap.common import plots

ROOT = Path(__file__).parents[2]


def write_table(folder: Path) -> str:
    assert main(["bench", "records", "--out", str(folder)]) == 0
    return (folder / records.PAGE).read_text()


def test_the_page_and_the_picture_in_the_repository_are_those_of_the_files():
    folder = ROOT / "bench/records"
    found = records.read_records(folder)
    assert (folder / records.PAGE).read_text(encoding="utf-8") == records.page(found, picture=bool(found))
    if found:
        assert records.content_of(found).encode() in (folder / records.PICTURE).read_bytes()


def test_a_table_without_records_says_so(tmp_path):
    assert "There is no record yet." in write_table(tmp_path)
    assert not (tmp_path / records.PICTURE).exists()


def test_records_are_listed_by_corpus_and_device_the_best_first(tmp_path):
    pytest.importorskip("matplotlib")
    invented_record(tmp_path / "a.json", 1.40)
    assert write_table(tmp_path).count("| [") == 1
    picture = (tmp_path / records.PICTURE).read_bytes()
    invented_record(tmp_path / "b.json", 1.35)
    invented_record(tmp_path / "c.json", 1.50, device="Another CPU, 8 threads")
    other = {"train_sha256": "b" * 64, "validation_sha256": "e" * 64}
    invented_record(tmp_path / "d.json", 1.20, data=other)
    text = write_table(tmp_path)
    places = [text.index(f"[{name}.json]({name}.json)") for name in "cbad"]
    assert places == sorted(places) and text.count("## pydocs, validation text ") == 2
    assert "| CPU, 2 threads | 1.3500 ± 0.0050 | 3 | 299 | 0.10M | 1 | 10 | 2026-01-02 |" in text
    assert (tmp_path / records.PICTURE).read_bytes() != picture
    content = records.content_of(records.read_records(tmp_path))
    assert content.encode() in (tmp_path / records.PICTURE).read_bytes() and content.encode() not in picture


def test_without_matplotlib_there_is_a_page_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "new_figure", lambda **settings: plots.log_missing())
    invented_record(tmp_path / "a.json")
    assert records.PICTURE not in write_table(tmp_path)


def test_what_a_record_says_stays_in_its_cell(tmp_path):
    invented_record(tmp_path / "a.json", device="x | [y](http://z) \x1b[2J\n## no")
    (line,) = (line for line in write_table(tmp_path).splitlines() if "a.json" in line)
    assert r"x \| \[y\](http://z)" in line and "\x1b" not in line and r"\n## no" not in line.split(" | ")[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(minutes=10.0), "is no row of the table: a row has runs of 5 minutes"),
        (lambda record: record["runs"].pop(), "is no row of the table: a row has at least 3 runs"),
        (lambda record: record.update(mean=1.0), "mean is 1.0"),
        (lambda record: record.update(protocol=9), "protocol 9"),
    ],
)
def test_a_table_of_files_that_are_no_rows_is_not_written(tmp_path, capsys, change, words):
    rewritten(invented_record(tmp_path / "a.json"), change, runs_too="runs" in words)
    assert_error(capsys, main(["bench", "records", "--out", str(tmp_path)]), BAD_DATA, words)
    assert not (tmp_path / records.PAGE).exists()


def test_a_record_is_added_once_if_every_claim_holds(tmp_path, capsys, monkeypatch):
    path, left = invented_record(tmp_path / "record.json"), []
    monkeypatch.setattr(records, "verify", lambda config: (json.loads(path.read_text()), left))
    command = ["bench", "records", "--out", str(tmp_path / "table"), "--add", str(path)]
    left.append("the checkpoints of 3 of 3 runs are not here")
    assert_error(
        capsys, main(command), USAGE, "is not added: 1 of its claims cannot be checked here (the che"
    )
    assert not (tmp_path / "table").exists()
    left.clear()
    assert main(command) == 0 and "1 record, with" in capsys.readouterr().out
    name = "pydocs-cpu-2-threads-2026-01-02-03-04.json"
    assert json.loads((tmp_path / "table" / name).read_text()) == json.loads(path.read_text())
    assert name in (tmp_path / "table" / records.PAGE).read_text()
    assert_error(capsys, main(command), CANNOT_CREATE, f"{name} is there already")


def test_a_record_that_is_no_row_is_refused_before_it_is_verified(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "verify", lambda config: pytest.fail("verified"))
    path = invented_record(tmp_path / "record.json", minutes=1.0)
    command = ["bench", "records", "--out", str(tmp_path), "--add"]
    assert_error(
        capsys, main([*command, str(path)]), USAGE, "a row has runs of 5 minutes, and these are of 1"
    )
    assert_error(capsys, main([*command, str(tmp_path / "none.json")]), NO_INPUT, "no record at")


def test_a_folder_that_is_not_there_is_not_made_for_an_empty_table(tmp_path, capsys):
    code = main(["bench", "records", "--out", str(tmp_path / "none")])
    assert_error(capsys, code, NO_INPUT, "no folder", "start in the checkout")

"""Parquet and Arrow files are read whole and in bounded memory, or refused."""

import json
import random

import pytest
from helpers.memory import peak_memory

from hotlap.common.errors import DataError
from hotlap.train.data import compressed
from hotlap.train.data.file_documents import file_documents
from hotlap.train.data.tables import column_names, table_rows

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

ROWS = [{"text": f"text {i}", "messages": [{"role": "user", "content": str(i)}]} for i in range(10)]


def write_arrow(path, columns, new=ipc.new_stream, **options):
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    with new(path, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, 3)
    return path


@pytest.mark.parametrize("new", [ipc.new_stream, ipc.new_file])
def test_arrow_files_have_the_rows_that_were_written(tmp_path, new):
    path = write_arrow(tmp_path / "a.arrow", pyarrow.Table.from_pylist(ROWS), new)
    assert list(table_rows(path)) == ROWS and column_names(path) == ["text", "messages"]
    assert list(file_documents(path, "strict")) == [row["text"] for row in ROWS]
    with pytest.raises(DataError, match=r"a\.arrow has the columns \['text', 'messages'\]; it needs `body`"):
        list(table_rows(path, ("body",)))


@pytest.mark.parametrize("new", [ipc.new_stream, ipc.new_file])
def test_an_arrow_file_that_is_cut_short_anywhere_is_refused(tmp_path, new):
    whole = write_arrow(tmp_path / "a.arrow", pyarrow.Table.from_pylist(ROWS), new).read_bytes()
    end = (
        len(whole) if new is ipc.new_stream else whole.rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8
    )  # then a footer
    for cut in range(0, end, 8):
        (tmp_path / "b.arrow").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b\.arrow is (damaged|cut short)"):
            list(table_rows(tmp_path / "b.arrow"))


def test_a_damaged_arrow_file_is_read_or_refused_and_breaks_nothing(tmp_path):
    raw = write_arrow(tmp_path / "a.arrow", pyarrow.Table.from_pylist(ROWS)).read_bytes()
    draw, path, refused = random.Random(0), tmp_path / "b.arrow", 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(3):
            damaged[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            list(table_rows(path))
        except DataError as error:
            refused += "b.arrow" in str(error)
    assert refused > 100


@pytest.mark.parametrize("new", [ipc.new_stream, ipc.new_file])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_arrow_file_is_refused(tmp_path, new, compression):
    path = write_arrow(tmp_path / "a.arrow", {"text": ["a" * 1000] * 9}, new, compression=compression)
    with pytest.raises(DataError, match=r"a\.arrow is a compressed Arrow file; save it as parquet"):
        list(table_rows(path))


def test_rows_that_share_what_is_in_an_arrow_file_are_refused(tmp_path):
    shared = pyarrow.array(["a", "a"]).dictionary_encode()
    nested = pyarrow.StructArray.from_arrays([shared], ["content"])
    for column in (shared, nested, pyarrow.array(["a", "a"]).cast(pyarrow.string_view())):
        path = write_arrow(tmp_path / "a.arrow", {"text": column})
        with pytest.raises(DataError, match=r"a\.arrow has the column 'text' of type .*; save plain strings"):
            list(table_rows(path))


def bomb(path):
    """A parquet file of less than a kilobyte that holds 4 GB."""
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["a" * 4_000_000])
    parquet.write_table(
        pyarrow.table({"text": rows}),
        path,
        compression="zstd",
        store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    )
    assert path.stat().st_size < 1000
    return path


READ = """
from pathlib import Path
from hotlap.common.errors import DataError
from hotlap.train.data.file_documents import file_documents
try:
    for _ in file_documents(Path({path!r}), "strict"):
        pass
except DataError as error:
    assert "expands more than 200 times" in str(error), error
else:
    raise SystemExit("it was read to its end")
"""


def test_a_parquet_file_of_a_kilobyte_cannot_fill_the_memory(tmp_path):
    """The usual batch of a thousand rows takes 4 GB, and their texts as much again."""
    path = bomb(tmp_path / "a.parquet")
    assert peak_memory(READ.format(path=str(path))) < 400_000_000


def test_a_parquet_file_that_claims_more_than_its_bytes_can_hold_is_refused_before_it_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 2_000_000], "id": [1]}), path, compression="zstd")
    with pytest.raises(DataError, match=r"a\.parquet expands more than 200 times"):
        next(table_rows(path, ("text",)))
    assert list(table_rows(path, ("id",))) == [{"id": 1}]  # whatever the columns that are not read
    nulls = pyarrow.table({"text": pyarrow.nulls(1_048_577, pyarrow.string())})
    parquet.write_table(nulls, path, row_group_size=1 << 21)
    with pytest.raises(DataError, match=r"a\.parquet expands more than 200 times"):
        next(table_rows(path, ("text",)))


def test_rows_that_share_values_in_a_parquet_file_are_counted_as_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    texts = [f"{i} " * 100 for i in range(2000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), path)
    assert list(file_documents(path, "strict")) == texts


def test_text_that_repeats_itself_as_logs_do_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    texts = [f"{i} INFO request served in {i % 7} ms\n" * 50 for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert list(file_documents(tmp_path / "a.parquet", "strict")) == texts
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(compressed.gzip.compress(lines.encode()))
    assert list(file_documents(tmp_path / "a.jsonl.gz", "strict")) == texts

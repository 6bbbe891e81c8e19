"""The rows of parquet files and of Arrow files, such as those in the folders of Hugging Face's `datasets`.

A small file may hold one long text a million times, so rows are read a few at a time, and a file that expands
far more than text does is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hotlap.common.errors import DataError
from hotlap.train.data.compressed import NEEDS_PYARROW, check_growth

if TYPE_CHECKING:
    import pyarrow

TABLES = (".parquet", ".arrow")
ROWS = 4  # of a parquet file, read at once; each may be as long as `check_growth` lets a file be
ARROW_FILE = b"ARROW1\0\0"  # before the stream, in a file that can be read in any order
END = b"\xff\xff\xff\xff\0\0\0\0"  # of the stream
SHARING = ("dictionary", "run_end_encoded", "string_view", "binary_view", "list_view", "large_list_view")


def is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def table_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, object]]:
    """The rows of a table, with these columns or all. DataError if it lacks one of them, is damaged, is not
    in the format that its name says, or is a bomb.
    """
    read = parquet_batches if path.suffix.lower() == ".parquet" else arrow_batches
    with explained(path):
        for batch in read(path, columns):
            names = batch.schema.names
            for values in zip(*batch.columns, strict=True):
                yield {name: value.as_py() for name, value in zip(names, values, strict=True)}


def column_names(path: Path) -> list[str]:
    """The names of a table's columns. DataError as of `table_rows`."""
    import_pyarrow(path)
    with explained(path):
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path).names
        with arrow_source(path) as source:
            return source.schema.names


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Make pyarrow's errors DataErrors."""
    pyarrow = import_pyarrow(path)
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's error, not pyarrow's
            raise
        reason = " ".join(str(error).splitlines()[:1])
        kind = "a parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
        raise DataError(f"{path} is damaged, or not {kind} file ({reason})") from error


def import_pyarrow(path: Path):
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"reading {path} {NEEDS_PYARROW}") from error
    return pyarrow


def check_columns(path: Path, names: Sequence[str], columns: Sequence[str] | None) -> None:
    for column in columns or ():
        if column not in names:
            raise DataError(
                f"{path} has the columns {list(names)}; it needs `{column}`, so rename the one that holds it"
            )


def parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import parquet

    size = path.stat().st_size
    with parquet.ParquetFile(path, memory_map=True) as file:
        names = file.schema_arrow.names
        check_columns(path, names, columns)
        for group in range(file.num_row_groups):
            footer = file.metadata.row_group(group)
            for i in range(footer.num_columns):
                chunk = footer.column(i)
                if columns is None or chunk.path_in_schema.split(".")[0] in columns:
                    check_growth(path, max(chunk.total_uncompressed_size, chunk.num_values), size)
        count = 0
        for batch in file.iter_batches(ROWS, columns=columns):
            count += sum(map(plain_bytes, batch.columns))
            check_growth(path, count, size)
            yield batch


def plain_bytes(column: pyarrow.Array) -> int:
    """The bytes of a column's values, of those that rows share as often as they are shared."""
    import pyarrow

    return (column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column).nbytes


def arrow_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
    """The batches of an Arrow file, as `datasets` writes them. It is memory-mapped, so they may be large."""
    with arrow_source(path) as source:
        check_columns(path, source.schema.names, columns)
        names = list(columns or source.schema.names)
        for name in names:
            check_type(path, name, source.schema.field(name).type)
        check_messages(path)
        for batch in source:
            batch = batch.select(names)
            batch.validate(full=True)  # a wrong offset would read beyond the file
            yield batch


@contextmanager
def arrow_source(path: Path) -> Iterator[pyarrow.RecordBatchStreamReader]:
    from pyarrow import ipc

    with mapped(path) as file, ipc.open_stream(file) as source:
        yield source


@contextmanager
def mapped(path: Path) -> Iterator[pyarrow.MemoryMappedFile]:
    """The stream in an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(len(ARROW_FILE)) != ARROW_FILE:
            file.seek(0)
        yield file


def check_type(path: Path, column: str, kind: pyarrow.DataType) -> None:
    """Raise DataError if rows may share what is in the file, so that it could expand to anything."""
    if str(kind).partition("<")[0] in SHARING:
        raise DataError(f"{path} has the column {column!r} of type {kind}; save plain strings and lists")
    for i in range(kind.num_fields):
        check_type(path, column, kind.field(i).type)


def check_messages(path: Path) -> None:
    """Raise DataError if the stream was cut off between two batches, or batches are compressed (`datasets`
    compresses none): they would be decompressed whole, however large.
    """
    from pyarrow import ipc

    with mapped(path) as file:
        for message in ipc.MessageReader.open_stream(file):
            if message.type == "record batch" and is_compressed(message.metadata.to_pybytes()):
                raise DataError(f"{path} is a compressed Arrow file; save it as parquet, or uncompressed")
        file.seek(max(0, file.tell() - len(END)))
        if file.read(len(END)) != END:
            raise DataError(f"{path} is cut short; copy or download it again")


def is_compressed(message: bytes) -> bool:
    """Whether the flatbuffer of a message describes a batch with compressed buffers (Arrow's Message.fbs)."""

    def field(table: int, number: int) -> int:
        """The position of a field of the table at a position; 0 if it has none."""
        offsets = table - struct.unpack_from("<i", message, table)[0]
        (size,) = struct.unpack_from("<H", message, offsets)
        at = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", message, offsets + at) if at < size else (0,)
        return offset and table + offset

    def target(position: int) -> int:
        return position + struct.unpack_from("<I", message, position)[0]

    header = field(target(0), 2)
    return bool(field(target(header), 3))

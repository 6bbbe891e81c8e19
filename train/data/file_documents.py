"""The documents in a text file, streamed: a file may be larger than memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hotlap.common.errors import DataError
from hotlap.common.log import log_once
from hotlap.train.data.compressed import BLOCK, expanded, inner_ending
from hotlap.train.data.tables import is_table, table_rows

LONGEST = 1 << 22  # characters of a document
LONGEST_LINE = 1 << 26  # characters; JSON is read by the line, and memory must not grow with the file
HEAD = 8192  # bytes that show what a file is
JSON_LINES = (".jsonl", ".ndjson", ".json")
REPLACE = ", or run `hotlap data` with --errors replace"
SURROGATES = re.compile("[\ud800-\udfff]")  # no text in UTF-8, but JSON may hold them
BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
NO_TEXT = {
    b"BZh": "compressed by bzip2", b"\xfd7zXZ\0": "compressed by xz", b"7z\xbc\xaf": "a 7z archive",
    b"PK\3\4": "a zip archive (as .docx, .xlsx and .epub are)", b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Word or Excel file", b"{\\rtf": "RTF",
    b"PAR1": "parquet without that ending", b"ARROW1": "an Arrow file without that ending",
}  # fmt: skip
SEPARATED = (".csv", ".tsv")


def file_documents(path: Path, errors: str) -> Iterator[str]:
    """The documents of a file: each row of a .parquet or .arrow file, each line of a .jsonl, .ndjson or .json
    file (the field `text`). Any other file is one document. All but tables may be compressed. A document of
    more than LONGEST characters is cut into several. A file without documents is an empty one.
    """
    ending = inner_ending(path)
    if is_table(path):
        texts: Iterable[Iterable[str]] = ([text] for text in table_documents(path))
    elif ending in JSON_LINES:
        texts = ([text] for text in json_documents(path, errors))
    elif ending in SEPARATED:
        raise DataError(
            f"{path} is a table of separated values; save it as parquet with a column `text`, or as JSON, "
            'with a line {"text": "..."} for each row'
        )
    else:
        texts = [text_parts(path, errors)]
    count = long = parts = 0
    for text in texts:
        documents = 0
        for document in bounded(text):
            yield document
            documents += 1
        count += documents
        if documents > 1:
            long, parts = long + 1, parts + documents
    if long:
        log_once(f"{path}: cut {long} documents of more than {LONGEST:,} characters into {parts}")
    if not count:
        yield ""


def bounded(parts: Iterable[str]) -> Iterator[str]:
    """Join the parts of a text, and cut it where it is longer than LONGEST: after a line, or else after a
    word, if that leaves at least half of LONGEST.
    """
    held = ""
    for part in parts:
        held += part
        while len(held) > LONGEST:
            ends = (held.rfind(end, LONGEST // 2, LONGEST) + 1 for end in "\n ")
            cut = next(filter(None, ends), LONGEST)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def json_documents(path: Path, errors: str) -> Iterator[str]:
    """The field `text` of each line that is not blank."""
    replaced = 0
    for number, line in enumerate(text_parts(path, errors, by_line=True), 1):
        if line.strip():
            try:
                text, surrogates = SURROGATES.subn("\ufffd", json_text(line))
            except DataError as error:
                raise DataError(f'{path}:{number}: {error}; each line must be {{"text": "..."}}') from None
            replaced += surrogates
            yield text
    if replaced:
        log_once(f"{path}: {replaced} halves of characters (such as \\ud83d) became U+FFFD")


def json_text(line: str) -> str:
    """The text of a line of JSON; DataError says what else it is."""
    if line.lstrip().startswith("["):
        raise DataError("a JSON array (`jq -c .[]` makes lines of it)")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise DataError(f"not JSON that Python can read ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{shortened(record)}, not an object")
    if "text" not in record and "messages" in record:
        raise DataError("a conversation, which is data for `hotlap sft`")
    if "text" not in record:
        raise DataError(f"no field `text` among {shortened(list(record))}")
    if not isinstance(record["text"], str):
        raise DataError(f"`text` is {shortened(record['text'])}, not a string")
    return record["text"]


def shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def text_parts(path: Path, errors: str, by_line: bool = False, remedy: str = REPLACE) -> Iterator[str]:
    """The text of a file in blocks, or in lines. Every line ends with a line feed.

    DataError says where the file is not text, or a line longer than LONGEST_LINE. remedy: what else to do.
    """
    lines = replaced = 0
    with opened(path, errors, remedy) as file:
        for part in iter(lambda: file.readline(LONGEST_LINE) if by_line else file.read(BLOCK), ""):
            if by_line and len(part) == LONGEST_LINE:
                raise DataError(f"{path}:{lines + 1}: a line of over {LONGEST_LINE:,} characters; split it")
            if "\0" in part:
                if errors == "strict":
                    line = lines + part[: part.index("\0")].count("\n") + 1
                    raise DataError(f"{path}:{line}: a NUL character, which is not text; remove it{remedy}")
                part = part.replace("\0", "\ufffd")
            lines += part.count("\n")
            replaced += part.count("\ufffd")
            yield part
    if replaced and errors == "replace":
        log_once(f"{path}: {replaced} U+FFFD, for bytes that are not text")


@contextmanager
def opened(path: Path, errors: str, remedy: str) -> Iterator[TextIO]:
    """A text file, decompressed, in the encoding that its byte-order mark names, or UTF-8. DataError if it is
    something else.
    """
    with expanded(path) as file:
        head = file.peek(HEAD)[:HEAD]
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        check_text(path, head, encoding)
        try:
            yield io.TextIOWrapper(file, encoding, errors)
        except UnicodeDecodeError:
            name = encoding.removesuffix("-sig").upper()
            raise DataError(
                f"{path} is not {name} at {undecodable(path, encoding)}; convert it (text of Windows: "
                f"iconv -f cp1252 -t utf-8 {path.name}){remedy}"
            ) from None


def check_text(path: Path, head: bytes, encoding: str) -> None:
    """Raise DataError if a file that begins like this is not text."""
    for signature, kind in NO_TEXT.items():
        if head.startswith(signature):
            raise DataError(f"{path} is {kind}; unpack or convert it, and name text files")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive; unpack it, and name the folder")
    if encoding in ("utf-8", "utf-8-sig") and b"\0" in head:
        raise DataError(
            f"{path} is binary or compressed, or UTF-16 without a byte-order mark; name UTF-8 text"
        )


def undecodable(path: Path, encoding: str) -> str:
    """The first byte that is not in this encoding, and its line."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line, block = 0, 1, b"-"
    with expanded(path) as file:
        while block:
            block = file.read(BLOCK)
            end += len(block)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                rest = len(error.object) - error.start  # which ends where the block does
                line += block[: max(0, len(block) - rest)].count(b"\n")
                return f"byte {end - rest} (line {line}: 0x{error.object[error.start]:02x})"
            line += block.count(b"\n")
    raise DataError(f"{path} changed while it was read")


def table_documents(path: Path) -> Iterator[str]:
    """The column `text` of a table, without its nulls, which are counted."""
    nulls = 0
    for row in table_rows(path, ("text",)):
        text = row["text"]
        if text is None:
            nulls += 1
        elif isinstance(text, str):
            yield text
        else:
            raise DataError(f"{path} has {type(text).__name__} in the column `text`; it must be strings")
    if nulls:
        log_once(f"{path}: left out {nulls} rows whose text is null")

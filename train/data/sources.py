"""Where text comes from: Python's own documentation, files, and Shakespeare's plays. Each source yields
documents.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import importlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.train.data.shakespeare import shakespeare_plays

SPLITS = ("train", "validation")
TEXT_FILES = (".txt", ".md", ".py", ".jsonl", ".parquet")
PARQUET_ROWS = 1024  # read at once
NOT_DOCUMENTATION = {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "antigravity", "this"}


def documents(source: str, errors: str = "strict") -> Iterator[str]:
    """The documents of a source: `pydocs`, `shakespeare`, or a path or pattern of .txt, .md, .py, .jsonl or
    .parquet files.

    errors: what to do with bytes that are not UTF-8, `strict` or `replace`.
    """
    if source == "pydocs":
        yield from python_documentation()
    elif source == "shakespeare":
        yield from shakespeare_plays()
    else:
        for path in matching_files(source):
            yield from file_documents(path, errors)


def split_documents(source: str, errors: str = "strict") -> tuple[list[str], list[str]]:
    """Training and validation documents, each different: about one in twenty validates, by the hash of its
    text.
    """
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in labelled_documents(source, errors):
        parts[split].append(document)
    return parts["train"], parts["validation"]


def documents_of(split: str, source: str, errors: str = "strict") -> Iterator[str]:
    """One of the parts that `split_documents` makes, a document at a time: for text larger than memory."""
    return (text for label, text in labelled_documents(source, errors) if label == split)


def labelled_documents(source: str, errors: str) -> Iterator[tuple[str, str]]:
    """Each different document with its split. The first ones wait until both splits have one."""
    waiting: list[tuple[str, str]] = []
    seen, found = set(), set()
    for document in documents(source, errors):
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:16]
        if document.strip() and digest not in seen:
            seen.add(digest)
            split = SPLITS[digest[0] < 256 // 20]
            found.add(split)
            waiting.append((split, document))
            if len(found) == 2:
                yield from waiting
                waiting.clear()
    if not found:
        raise DataError(f"{source!r} holds no text; name files with text in them, or pydocs")
    if waiting:  # too few documents to leave it to chance
        texts = [text for _, text in waiting]
        train, validation = split_text(texts[0]) if len(texts) == 1 else (texts[1:], texts[:1])
        yield from (("train", text) for text in train)
        yield from (("validation", text) for text in validation)


def split_text(text: str) -> tuple[list[str], list[str]]:
    """One text as training and validation: its first 90 % and the rest, nanoGPT's split."""
    cut = int(len(text) * 0.9)
    return [text[:cut]], [text[cut:]]


def matching_files(pattern: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted."""
    path = Path(pattern)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in TEXT_FILES]
    else:
        found = [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
        raise FileNotFoundError(f"no input files match {pattern!r}; name a file, a folder or pydocs")
    return sorted(found)


def file_documents(path: Path, errors: str) -> Iterator[str]:
    """A text file is one document; a line of a .jsonl file and a row of a .parquet file are, by their field
    `text`.
    """
    if path.suffix == ".parquet":
        yield from parquet_documents(path)
        return
    raw = path.read_bytes()
    if b"\0" in raw[:8192] or raw[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is a binary or compressed file; unpack it, or name text files")
    try:
        text = raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, or give `hotlap data` --errors replace"
        ) from None
    text = text.replace("\r\n", "\n")
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 does not end a line of JSON
        if line.strip():
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise DataError(f'{path}:{number}: each line must be {{"text": "..."}}')
            yield document


def parquet_documents(path: Path) -> Iterator[str]:
    """The column `text` of a parquet file; rows without a text are left out."""
    for text in parquet_column(path, "text"):
        if text is not None:
            if not isinstance(text, str):
                raise DataError(f"{path} has {type(text).__name__} in the column `text`; it must be strings")
            yield text


def parquet_column(path: Path, name: str) -> Iterator[object]:
    """The values of a column of a parquet file, some rows at a time. DataError where it is none, is damaged,
    or has no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read: pip install 'hotlap[data]'") from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            if name not in file.schema_arrow.names:
                raise DataError(f"{path} has the columns {file.schema_arrow.names}; it needs `{name}`")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[name]):
                yield from batch.column(name).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a parquet file, or damaged ({reason})") from error


def python_documentation() -> Iterator[str]:
    """The documentation inside the Python that runs this: about 2 MB, a document for each module, class and
    function.

    Docstrings of modules written in Python are read from their source without running it. Those of the
    built-in modules in C, and the language reference of `help()`, are imported.
    """
    from pydoc_data import topics

    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - NOT_DOCUMENTATION):
        if name.startswith("_"):
            continue
        path = library / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [library / f"{name}.py"]
        for file in files:
            relative = file.relative_to(library)
            if file.is_file() and not {"test", "tests", "idle_test"} & set(relative.parts):
                module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
                yield from source_documentation(module, file)
    for name in ("builtins", *sorted(sys.builtin_module_names), "math", "array", "zlib"):
        if name == "builtins" or not name.startswith("_"):
            yield from object_documentation(name, importlib.import_module(name))
    for topic, text in sorted(topics.topics.items()):
        yield f"{topic}\n\n{text.strip()}\n"


def source_documentation(module: str, path: Path) -> Iterator[str]:
    """Documents of one source file, by its syntax tree."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or in another encoding
        return
    if text := ast.get_docstring(tree):
        yield f"{module}\n\n{text}\n"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            parts = list(node_documentation(node, f"{module}.{node.name}"))
            if parts:
                yield "\n".join(parts)


def node_documentation(node: ast.AST, name: str) -> Iterator[str]:
    signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
    if text := ast.get_docstring(node):
        yield f"{name}{signature}\n\n{text}\n"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from node_documentation(child, f"{name}.{child.name}")


def object_documentation(name: str, module: object) -> Iterator[str]:
    """Documents of a module in C, by inspection."""
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not callable(value) or not inspect.getdoc(value):
            continue
        qualified = attribute if name == "builtins" else f"{name}.{attribute}"
        parts = [described(qualified, value)]
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function) and inspect.getdoc(function):
                    parts.append(described(f"{qualified}.{method}", function))
        yield "\n".join(parts)


def described(name: str, value: object) -> str:
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        signature = ""
    return f"{name}{signature}\n\n{inspect.getdoc(value)}\n"

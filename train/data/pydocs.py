"""`pydocs`: the documentation inside the Python that runs this, as training text."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NOT_DOCUMENTATION = {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "antigravity", "this"}


@cache  # it is read several times, and takes seconds to collect
def python_documentation() -> tuple[str, ...]:
    """About 2 MB of text: one document per module, class and function, without duplicates."""
    return tuple(dict.fromkeys(library_documentation()))


def library_documentation() -> Iterator[str]:
    """The documents of the standard library and of the language reference.

    Docstrings of modules written in Python are parsed from their source, which is not run. C modules and the
    language reference of `help()` are imported.
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
    """The documents of one source file: its docstrings."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or another encoding
        return
    if text := ast.get_docstring(tree):
        yield f"{module}\n\n{text}\n"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            parts = list(node_documentation(node, f"{module}.{node.name}"))
            if parts:
                yield "\n".join(parts)


def node_documentation(node: ast.AST, name: str) -> Iterator[str]:
    """The docstring of a function, or of a class and its methods."""
    signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
    if text := ast.get_docstring(node):
        yield f"{name}{signature}\n\n{text}\n"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from node_documentation(child, f"{name}.{child.name}")


def object_documentation(name: str, module: object) -> Iterator[str]:
    """The documents of a C module, by inspection."""
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
    """Name, signature where there is one, and docstring."""
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        signature = ""
    return f"{name}{signature}\n\n{inspect.getdoc(value)}\n"

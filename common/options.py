"""Flags from frozen dataclasses: a preset, then a TOML file, then the command line; and config.json of the
result. tyro types and checks the values of all three.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hotlap.common.errors import known

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def parse(
    kind: type[Config],
    arguments: list[str],
    *,
    command: str,
    presets: dict[str, Callable[[], Config]] | None = None,
    depth: Callable[[int], Config] | None = None,
) -> Config:
    """The configuration that a command line means.

    presets and depth give the values to start from (--preset NAME, --depth N), --config FILE.toml overrides
    them, and every other flag overrides that.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    notes = ["--config FILE.toml: values for these flags"]
    if presets:
        first.add_argument("--preset")
        notes.append(f"--preset NAME: values to start from: {', '.join(presets)}")
    if depth:
        first.add_argument("--depth", type=int)
        notes.append("--depth N: nanochat's model of N layers, with everything else by rule")
    notes.append("--debug: show the traceback of an error")
    chosen, rest = first.parse_known_args(arguments)
    if getattr(chosen, "preset", None) and getattr(chosen, "depth", None):
        raise ValueError("--preset and --depth exclude each other; give one of them")
    start = kind()
    if getattr(chosen, "preset", None):
        start = presets[known(chosen.preset, presets, "preset")]()
    if getattr(chosen, "depth", None) is not None:
        start = depth(chosen.depth)
    if chosen.config:
        start = merge(start, read_toml(chosen.config), str(chosen.config))
    description = f"{(kind.__doc__ or '').strip()}\n\n" + "\n".join(notes)
    return from_flags(start, rest, prog=f"hotlap {command}", description=description)


def from_flags(start: Config, arguments: list[str], **texts: str) -> Config:
    """start with the fields that flags change. tyro prints help and mistakes, and exits."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "the package tyro is missing, which reads the flags: pip install tyro. Without it there is "
            "python -m hotlap.bench.suite look --out DIR"
        ) from error
    return tyro.cli(type(start), default=start, args=arguments, **texts)


def read_toml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def merge(config: Config, values: dict, where: str) -> Config:
    """config with a TOML table's values in place of its own. where: what the table is from, for errors."""
    fields = flat(dataclasses.asdict(config))
    for key, value in flat(values).items():
        name = known(key.replace("-", "_"), fields, f"key in {where}")
        try:
            with contextlib.redirect_stderr(io.StringIO()) as printed:
                config = from_flags(config, as_flag(name, value))
        except SystemExit:
            raise ValueError(f"{where}: {key}={value!r}: {unboxed(printed.getvalue())}") from None
    return config


def flat(table: dict, prefix: str = "") -> dict[str, Any]:
    """A table of tables as one, with keys like `loop.steps`."""
    found = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def as_flag(name: str, value: Any) -> list[str]:
    """The arguments that give a field a TOML value: --loop.steps=5, --model.no-smear, --tasks facts core."""
    if isinstance(value, list):
        return [f"--{name}", *words(value)]
    if isinstance(value, bool):
        return ["--" + (name if value else re.sub(r"([^.]+)$", r"no-\1", name))]
    return [f"--{name}={value}"]


def words(value: Any) -> list[str]:
    """The items of a list, and of the lists in it, as a command line has them: in one row."""
    return [word for item in value for word in words(item)] if isinstance(value, list) else [str(value)]


def unboxed(text: str) -> str:
    """The first paragraph of what tyro prints in a box, below the box's title."""
    _, _, paragraphs = text.partition("\n")
    found = (part.replace("│", " ").split() for part in re.split("[─-]{9,}", paragraphs))
    return " ".join(next(filter(None, found), []))


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1, default=str) + "\n"


def differences(saved: dict, current: dict, prefix: str = "") -> list[str]:
    """`field: saved X, current Y` for each field that differs."""
    old, new = flat(saved, prefix), flat(current, prefix)
    return [
        f"{key}: saved {old.get(key)!r}, current {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]

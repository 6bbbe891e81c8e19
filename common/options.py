"""Frozen dataclasses from a preset, a TOML file and flags, in that order; tyro checks all values."""

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
    """The configuration for a command line.

    --preset NAME and --depth N set the initial values, from `presets` and `depth`. --config FILE.toml
    overrides them, and other flags override the file.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    notes = ["--config FILE.toml: read these flags from a file"]
    if presets:
        first.add_argument("--preset")
        notes.append(f"--preset NAME: start from a preset: {', '.join(presets)}")
    if depth:
        first.add_argument("--depth", type=int)
        notes.append("--depth N: start from nanochat's rules for a model of N layers")
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
    return from_flags(start, rest, prog=command, description=description)


def from_flags(start: Config, arguments: list[str], **texts: str) -> Config:
    """`start`, changed by flags. tyro prints help and mistakes, and exits."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "flags need the package tyro: pip install tyro. Without it, only "
            "`python -m hotlap.bench.suite look --out DIR` works"
        ) from error
    return tyro.cli(type(start), default=start, args=arguments, **texts)


def read_toml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def merge(config: Config, values: dict, where: str) -> Config:
    """config, changed by the values of a TOML table. where: the source of the table, for errors."""
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
    """Flatten nested tables to keys like `loop.steps`."""
    found = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def as_flag(name: str, value: Any) -> list[str]:
    """Arguments that set a field to a TOML value: --loop.steps=5, --model.no-smear, --tasks facts core."""
    if isinstance(value, list):
        return [f"--{name}", *words(value)]
    if isinstance(value, bool):
        return ["--" + (name if value else re.sub(r"([^.]+)$", r"no-\1", name))]
    return [f"--{name}={value}"]


def words(value: Any) -> list[str]:
    """The items of nested lists as a flat list of arguments."""
    return [word for item in value for word in words(item)] if isinstance(value, list) else [str(value)]


def unboxed(text: str) -> str:
    """The first paragraph in the box that tyro prints, below its title."""
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

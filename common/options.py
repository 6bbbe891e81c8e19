"""Flags from frozen dataclasses: a preset, then a TOML file, then the command line; and config.json of the
result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    default: Config | None = None,
    presets: dict[str, Callable[[], Config]] | None = None,
    depth: Callable[[int], Config] | None = None,
) -> Config:
    """The configuration that a command line means.

    presets and depth give the values to start from (--preset NAME, --depth N), --config FILE.toml overrides
    them, and every other flag overrides that.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "the package tyro is missing, which reads the flags: pip install tyro. Without it there is "
            "python -m hotlap.bench.suite look --out DIR"
        ) from error
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    notes = ["--config FILE.toml: values for these flags"]
    if presets:
        first.add_argument("--preset")
        notes.append(f"--preset NAME: values to start from: {', '.join(presets)}")
    if depth:
        first.add_argument("--depth", type=int)
        notes.append("--depth N: nanochat's model of N layers, with everything else by rule")
    chosen, rest = first.parse_known_args(arguments)
    if getattr(chosen, "preset", None) and getattr(chosen, "depth", None):
        raise ValueError("--preset and --depth exclude each other; give one of them")
    if getattr(chosen, "preset", None):
        default = presets[known(chosen.preset, presets, "preset")]()
    if getattr(chosen, "depth", None) is not None:
        default = depth(chosen.depth)
    start = default if default is not None else kind()
    if chosen.config:
        start = merge(start, read_toml(chosen.config), str(chosen.config))
    return tyro.cli(
        kind,
        prog=f"hotlap {command}",
        description=f"{(kind.__doc__ or '').strip()}\n\n" + "\n".join(notes),
        default=start,
        args=rest,
    )


def read_toml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def merge(config: Config, values: dict, where: str) -> Config:
    """config with some of its fields replaced, tables going into the dataclasses inside it."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kinds = get_type_hints(type(config))
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = known(key.replace("-", "_"), fields, f"key in {where}")
        old = fields[name]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key} must be a table")
            changed[name] = merge(old, value, where)
        elif get_origin(kinds[name]) is Literal:
            changed[name] = known(value, get_args(kinds[name]), f"{key} in {where}")
        else:
            changed[name] = converted(value, old, kinds[name], f"{where}: {key}")
    return dataclasses.replace(config, **changed)


def converted(value: Any, old: Any, kind: Any, where: str) -> Any:
    """A TOML value as the field holds it, of the type `kind`. A field that holds nothing yet is a path."""
    if isinstance(old, Path) or old is None:
        needed, fits = "a path", isinstance(value, str)
        new = Path(value) if fits else None
    elif isinstance(old, tuple):
        needed, any_length = f"a list like {list(old)}", ... in get_args(kind)
        fits = isinstance(value, list) and (any_length or len(value) == len(old))
        new = tuple(converted(item, old[0], type(old[0]), where) for item in value) if fits else None
    else:
        new = float(value) if isinstance(old, float) and type(value) is int else value
        needed, fits = type(old).__name__, type(new) is type(old)
    if not fits:
        raise ValueError(f"{where}={value!r} must be {needed}")
    return new


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1, default=str) + "\n"


def differences(saved: dict, current: dict, prefix: str = "") -> list[str]:
    """`field: saved X, current Y` for each field that differs."""
    found = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: saved {old!r}, current {new!r}")
    return found

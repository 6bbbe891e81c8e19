"""Frozen dataclasses from a preset, a file and flags, in that order; tyro checks all values."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from hotlap.common.errors import known
from hotlap.common.files import read_object

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")
ONLY_FLAGS = ("config", "preset", "depth")  # not keys of a file
# What tyro and argparse print of a value of the wrong type, and how to say it.
WRONG_TYPE = {
    r"(?:.*invalid literal for int.*|invalid int value): (.*)": "a whole number, in digits only",
    r"(?:.*could not convert string to float|invalid float value): (.*)": "a number, such as 0.5",
    r"Could not (?:parse|find valid parse for) arguments:? \[(.*?)\].*": "as many numbers as --help shows",
}
DASHES = "\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # from a formatted page


class Flags(argparse.ArgumentParser):
    """argparse whose mistakes are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{plain(message)}; `{self.prog} --help` lists the flags")


def parse(
    kind: type[Config],
    arguments: list[str],
    *,
    command: str,
    presets: dict[str, Callable[[], Config]] | None = None,
    depth: Callable[[int], Config] | None = None,
) -> Config:
    """The configuration for a command line.

    --preset NAME and --depth N set the initial values, from `presets` and `depth`. --config FILE
    overrides them, and other flags override the file. If the class has a `model_field`, its name, a word
    without a flag and --model set that field. Its `start`, if it has one, gives the defaults for what is in
    FILE. ValueError for what cannot be read.
    """
    first = Flags(prog=command, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)  # ONLY_FLAGS names these
    rows = {"--config FILE": "read flags from a .toml, or a run's config.json; others override them"}
    if presets:
        first.add_argument("--preset")
        rows["--preset NAME"] = (
            f"start from one of {', '.join(presets)}; `{command} --preset NAME --help` shows what it sets"
        )
    if depth:
        first.add_argument("--depth", type=int)
        rows["--depth N"] = "start from nanochat's rules for a model of N layers"
    model_field = getattr(kind, "model_field", None)
    if model_field:
        rows["MODEL, --model MODEL"] = f"the same as --{model_field} MODEL"
    rows["--debug"] = "show the traceback of an error"
    chosen, rest = first.parse_known_args(arguments)
    if getattr(chosen, "preset", None) and getattr(chosen, "depth", None) is not None:
        raise ValueError("--preset and --depth exclude each other; give one of them")
    table = read_table(chosen.config) if chosen.config else {}
    start = kind.start(table) if hasattr(kind, "start") else kind()
    if getattr(chosen, "preset", None):
        start = presets[known(chosen.preset, presets, "preset")]()
    if getattr(chosen, "depth", None) is not None:
        try:
            start = depth(chosen.depth)
        except ValueError as error:
            text = str(error).replace(f"depth={chosen.depth}", f"--depth {chosen.depth}")
            raise ValueError(text) from None
    if chosen.config:
        start = merge(start, table, str(chosen.config))
    if model_field:
        rest = [re.sub(r"^--model(?==|$)", f"--{model_field}", word) for word in rest]
    check_switches(start, rest)
    text = "\n".join(f"  {flag:22} {about}" for flag, about in rows.items())
    description = f"{(kind.__doc__ or '').strip()}\n\n{text}"
    config, unknown = from_flags(start, rest, prog=command, description=description)
    if model_field and unknown and not unknown[0].startswith("-"):
        config, _ = from_flags(config, [f"--{model_field}={unknown.pop(0)}"])
    if unknown:
        raise ValueError(f"{unexpected(unknown, start, rows)}; `{command} --help` lists the flags")
    return config


def from_flags(start: Config, arguments: list[str], **texts: str) -> tuple[Config, list[str]]:
    """`start`, changed by flags, and the arguments that it has no flags for. ValueError for wrong values.
    tyro prints help, and exits.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "flags need the package tyro: pip install tyro. Without it, only "
            "`python -m hotlap.bench.suite look --out DIR` works"
        ) from error
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            return tyro.cli(type(start), default=start, args=arguments, return_unknown_args=True, **texts)
    except SystemExit as exit:
        if not exit.code:
            raise
    hint = f"; `{texts['prog']} --help` lists the flags" if "prog" in texts else ""
    raise ValueError(plain(unboxed(printed.getvalue()).rstrip(".")) + hint)


def plain(message: str) -> str:
    """A message about a value of the wrong type, without Python's words."""
    for pattern, needed in WRONG_TYPE.items():
        if found := re.fullmatch(rf"(?:Error parsing|argument) (\S+): {pattern}", message):
            return f"{found[1]} {found[2]} must be {needed}"
    return message


def check_switches(start: Config, arguments: list[str]) -> None:
    """Raise ValueError for a switch with a value, such as --model.smear=false."""
    flags = {f"--{flag}" for flag in flags_of(start)}
    pairs = {flag: off for flag in flags if (off := as_flag(flag[2:], False)[0]) in flags}
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, _ = word.replace("_", "-").partition("=")
        given = word if equals else f"{word} {following}"
        for on, off in pairs.items():
            if flag in (on, off) and (equals or following.lower() in ("true", "false", "0", "1")):
                raise ValueError(f"{given}: a switch takes no value; {on} turns it on, {off} turns it off")


def unexpected(arguments: list[str], start: Config, rows: Iterable[str]) -> str:
    """What is wrong with arguments that there are no flags for, with a suggestion."""
    wrong = next((word for word in arguments if word.startswith(("-", *DASHES))), None)
    if wrong is None:
        return f"unexpected argument {arguments[0]!r}"
    if wrong[0] in DASHES:
        return f"unexpected argument {wrong!r}: it begins with {unicodedata.name(wrong[0])}, not with --"
    given = wrong.partition("=")[0].lstrip("-").replace("_", "-")
    flags = ["help", *(flag for row in rows for flag in re.findall(r"--([a-z]+)", row)), *flags_of(start)]
    near = [flag for flag in flags if flag.split(".")[-1] == given.split(".")[-1]]
    if given and not near:
        near = [flag for flag in flags if any(f.startswith(given) for f in (flag, flag.split(".")[-1]))]
    near = near or difflib.get_close_matches(given, flags, n=1)
    if not near:
        ends = {flag.split(".")[-1]: flag for flag in flags}
        near = [ends[end] for end in difflib.get_close_matches(given, ends, n=1)]
    hint = f"; did you mean {' or '.join(f'--{flag}' for flag in near[:3])}?" if near else ""
    return f"unknown flag {wrong.partition('=')[0]}{hint}"


def flags_of(config: Any) -> list[str]:
    """The names of a configuration's flags, as tyro makes them."""
    return [flag for flag, _ in settings(config)]


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's flags, each with the type of its field. What has a place has no flag."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, name, hint = getattr(config, field.name), field.name.replace("_", "-"), hints[field.name]
        marks = [str(mark) for mark in getattr(hint, "__metadata__", ())]
        if "Positional" in marks:
            continue
        if dataclasses.is_dataclass(value):
            omitted = "OmitArgPrefixes" in marks
            yield from settings(value, prefix if omitted else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint
            if isinstance(value, bool):
                yield f"{prefix}no-{name}", hint


def choices(hint: Any) -> list[str]:
    """The values that a field of this type is limited to, as they are typed; none where it takes others."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [value for part in get_args(hint) for value in choices(part)]


def as_typed(message: str, config: Any, arguments: list[str]) -> str:
    """A message with `field=value` replaced by the flag that set it, or by the key in the --config file."""
    typed, file, keys = {}, None, {}
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, given = word.partition("=")
        given = given if equals else following
        if flag.startswith("--"):
            typed[flag.lstrip("-").replace("-", "_").split(".")[-1]] = flag, given
        if flag == "--config":
            file, keys = given, {key.replace("-", "_") for key in flat(read_table(Path(given)))}
    for name, value in flat(dataclasses.asdict(config)).items():
        field = name.split(".")[-1]
        forms = [str(value), repr(value), *([f"{value:g}"] if isinstance(value, float) else [])]
        values = "|".join(map(re.escape, forms))
        text = rf"(?<![\w.])(?:{re.escape(name)}|{re.escape(field)})=(?:{values})(?![\w.])"
        if field in typed:
            flag, given = typed[field]
            shown = str(value) if isinstance(value, tuple) else given
            message = re.sub(text, lambda found: f"{flag} {shown}", message)  # noqa: B023
        elif name in keys:
            message = re.sub(text, lambda found: f"{file}: {name}={value}", message)  # noqa: B023
    return message


def read_table(path: Path) -> dict:
    """The fields in a configuration file: TOML, or a run's config.json."""
    if path.suffix == ".json" and path.is_file():
        return read_object(path)
    return read_toml(path)


def read_toml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def merge(config: Config, values: dict, where: str) -> Config:
    """config, changed by the values of a table. where: the source of the table, for errors."""
    fields, current = flat(dataclasses.asdict(config)), flat(json.loads(to_json(config)))
    for key, value in flat(values).items():
        name = key.replace("-", "_")
        if name in ONLY_FLAGS:
            raise ValueError(f"{where}: {key} is not set in a file; give the flag --{key}={value}")
        if any(field.startswith(f"{name}.") for field in fields):
            raise ValueError(
                f"{where}: {key}={value!r} is not a table; begin it with [{key}] on its own line"
            )
        name = known(name, fields, f"key in {where}")
        misfit = f"{where}: {key}={value!r} does not fit {name}, which is {fields[name]!r} by default"
        if isinstance(value, bool) and not isinstance(fields[name], bool):
            raise ValueError(misfit)
        if type(value) is type(current[name]) and value == current[name]:
            continue  # a run's config.json has them all, and each takes tyro long
        try:
            config, unknown = from_flags(config, as_flag(name, value))
        except ValueError as error:
            raise ValueError(f"{where}: {key}={value!r}: {error}") from None
        if unknown:
            raise ValueError(misfit)
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

"""Scripts that complete the words of the `hotlap` command in a shell.

They hold all commands and flags, so that Tab starts no Python. What is neither is completed as a file.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from hotlap.common.options import Flags, choices, settings

# By what was typed so far: the words that follow, each with its values.
Words = dict[str, dict[str, list[str]]]

BASH = """\
_hotlap() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} path=hotlap i
    if [[ $word == "=" ]]; then word=; elif [[ $before == "=" ]]; then before=${COMP_WORDS[COMP_CWORD-2]}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path ${COMP_WORDS[i]}" in
            PATHS) path="$path ${COMP_WORDS[i]}" ;;
            *) break ;;
        esac
    done
    local words=
    case "$path $before" in
VALUES
        *) case "$path" in
FOLLOWING
        esac ;;
    esac
    COMPREPLY=()
    if [[ $word == -* || $words != -* ]]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}
complete -o default -F _hotlap hotlap
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
FISH = """\
function __hotlap_after
    set -l typed (commandline -opc) ""
    test (count $typed) -gt (count $argv); and test "$typed[1..$(count $argv)]" = "$argv"
end
"""


def shell(name: str, *arguments: str) -> str:
    """The flags of `hotlap completion NAME`, which has none."""
    Flags(prog=f"hotlap completion {name}", description=f"print a script for {name}").parse_args(arguments)
    return name


def script(name: str, table: dict[str, Any]) -> str:
    """The script for bash, zsh or fish. table: the table of commands of cli.py."""
    words = following("hotlap", table)
    return fish(words) if name == "fish" else (ZSH if name == "zsh" else "") + bash(words)


def following(path: str, table: dict[str, Any]) -> Words:
    """What may follow each beginning of a command line. A command's own words are its flags."""
    found: Words = {path: {word: [] for word in (*table, "--help", "--version")}}
    for name, row in table.items():
        if hasattr(row, "commands"):
            found |= following(f"{path} {name}", row.commands)
        else:
            found[f"{path} {name}"] = flags(row)
    return found


def flags(command: Any) -> dict[str, list[str]]:
    """A command's flags, each with the values that it is limited to."""
    module, _, name = command.config.partition(":")
    kind = getattr(importlib.import_module(f"hotlap.{module}"), name)
    found: dict[str, list[str]] = {}
    if dataclasses.is_dataclass(kind):
        found = {f"--{flag}": choices(hint) for flag, hint in settings(kind())}
        found["--config"] = []
        if hasattr(kind, "model_field"):
            found["--model"] = []
    if command.presets:
        presets = importlib.import_module(f"hotlap.{command.presets}").PRETRAIN
        found |= {"--preset": list(presets), "--depth": []}
    return found | {"--help": [], "--debug": []}


def bash(words: Words) -> str:
    """Also for zsh, which reads it by its own `bashcompinit`."""
    values = [
        f'        "{path} {flag}") words="{" ".join(limited)}" ;;'
        for path, row in words.items()
        for flag, limited in row.items()
        if limited
    ]
    rows = [f'            "{path}") words="{" ".join(row)}" ;;' for path, row in words.items()]
    text = BASH.replace("PATHS", "|".join(f'"{path}"' for path in words))
    return text.replace("VALUES", "\n".join(values)).replace("FOLLOWING", "\n".join(rows))


def fish(words: Words) -> str:
    lines = []
    for path, row in words.items():
        after = f"complete -c hotlap -n '__hotlap_after {path}'"
        for word, limited in row.items():
            if word.startswith("--"):
                lines.append(f"{after} -l {word[2:]}" + (f" -xa '{' '.join(limited)}'" if limited else ""))
            else:
                count = len(path.split())
                only = f"{after[:-1]}; and test (count (commandline -opc)) -eq {count}'"
                lines.append(f"{only} -fa {word}")
    return FISH + "\n".join(lines) + "\n"

"""Helpers that tests of the `hotlap` command import."""

from pathlib import Path

from helpers.small_runs import MODEL_FLAGS

from hotlap.cli import main

USAGE, BAD_DATA, NO_INPUT, CANNOT_CREATE, INPUT_OUTPUT, INTERRUPTED = 2, 65, 66, 73, 74, 130
SMALL = [*MODEL_FLAGS, "--batch-rows", "4", "--loop.steps", "4", "--dtype", "float32", "--compile", "off"]


def pretrain_here(*flags: str) -> int:
    return main(
        ["pretrain", "--data", "text.txt", "--tokenizer", "characters", "--out", "base", *SMALL, *flags]
    )


def sft_here(base: Path, *flags: str) -> int:
    fixed = ["--loop.steps", "2", "--batch-rows", "4", "--dtype", "float32", "--compile", "off"]
    return main(["sft", "--base", str(base), "--data", "talks.jsonl", "--out", "sft", *fixed, *flags])


def assert_error(capsys, code: int, expected: int, *parts: str) -> None:
    """The command failed with this code and one line, which holds the parts: what was given, what to try."""
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == expected and len(errors) == 1 and lines[-1] == errors[0], printed.err
    assert "Traceback" not in printed.err + printed.out
    for part in parts:
        assert part in errors[0]

"""The scripts of `hotlap completion`, run by the shells that they are for."""

import shutil
import subprocess

import pytest

from hotlap.cli import COMMANDS, main
from hotlap.common.completion import script

ASK = {
    "bash": """
        COMP_WORDS=(%s) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _hotlap; printf '%%s\\n' "${COMPREPLY[@]}"; complete -p hotlap""",
    "fish": "complete -C '%s' | string replace -r '\\t.*' ''; true",
}


def completed(shell: str, line: str, folder) -> set[str]:
    """What the shell offers for the last word of a line."""
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    words = " ".join("''" if word == "" else word for word in line.replace("=", " = ").split(" "))
    code = script(shell, COMMANDS) + ASK[shell] % (words if shell == "bash" else line)
    done = subprocess.run([shell, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return set(done.stdout.splitlines()) - {"", "complete -o default -F _hotlap hotlap"}


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hotlap pre", {"pretrain"}),
        ("hotlap speedrun ", {"tiny", "minutes", "gpt2-124m", "gpt2-grade"}),
        ("hotlap speedrun ti", {"tiny"}),
        ("hotlap pretrain --model.w", {"--model.width", "--model.window-pattern"}),
        ("hotlap pretrain --out run --model.wid", {"--model.width"}),
        ("hotlap pretrain --preset sh", {"shakespeare-char"}),
        ("hotlap sft --base x --dtype b", {"bfloat16"}),
        ("hotlap sft --recompute ", {"none", "block", "selective"}),
        ("hotlap eval --mod", {"--model"}),
        ("hotlap export weights --o", {"--out"}),
        ("hotlap nonsense --o", set()),
        ("hotlap compare --b", {"--base"}),
    ],
)
def test_commands_flags_and_choices(shell, line, offered, tmp_path):
    found = completed(shell, line, tmp_path)
    assert found - {"--help", "--version"} == offered


def test_a_value_after_an_equals_sign(tmp_path):
    assert completed("bash", "hotlap pretrain --dtype=fl", tmp_path) == {"float32"}


@pytest.mark.parametrize("line", ["hotlap chat ", "hotlap chat run", "hotlap sft --base "])
def test_everything_else_is_left_to_the_shells_own_files(line, tmp_path):
    (tmp_path / "runs").mkdir()
    assert completed("bash", line, tmp_path) == set()
    assert "runs/" in completed("fish", line, tmp_path)


def test_zsh_reads_the_script(tmp_path):
    if not shutil.which("zsh"):
        pytest.skip("there is no zsh")
    code = script("zsh", COMMANDS) + 'print -r -- "$_comps[hotlap]"'
    done = subprocess.run(["zsh", "-fc", code], cwd=tmp_path, capture_output=True, text=True)
    assert "_hotlap" in done.stdout and done.stderr == ""


def test_the_command_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash", COMMANDS)

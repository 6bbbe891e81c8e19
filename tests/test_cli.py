"""The `hotlap` command up to pretraining: what it says, and with which exit code."""

import bz2
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import (
    BAD_DATA,
    CANNOT_CREATE,
    INPUT_OUTPUT,
    INTERRUPTED,
    NO_INPUT,
    SMALL,
    USAGE,
    assert_error,
    pretrain_here,
)

from hotlap import cli
from hotlap.cli import COMMANDS, main
from hotlap.model.tokenizer import Tokenizer
from hotlap.train import pretrain, stage


def test_alone_it_lists_the_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["speedrun", "tiny"]], ids=" ".join)
def test_every_command_has_help(command, capsys):
    try:
        code = main([*command, "--help"])
    except SystemExit as exit:
        code = exit.code
    out = capsys.readouterr().out
    assert code == 0 and "usage" in out and command[-1] in out


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert_error(capsys, main(["pretrian"]), USAGE, "'pretrian'", "did you mean 'pretrain'?")
    assert_error(capsys, main(["zzz"]), USAGE, "'zzz'", "known: speedrun")
    assert_error(capsys, main(["speedrun", "tyny"]), USAGE, "did you mean 'tiny'?")


def test_an_unknown_flag_gets_a_suggestion(capsys):
    code = main(["pretrain", "--batch-rowz", "3"])
    assert_error(capsys, code, USAGE, "unknown flag --batch-rowz; did you mean --batch-rows?")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("pretrain --loop.steps ten", ("--loop.steps", "'ten'")),
        ("pretrain --loop.steps=ten", ("--loop.steps", "'ten'")),
        ("pretrain --batch_rows x", ("--batch-rows", "'x'")),
        ("pretrain --batch-rows", ("--batch-rows", "Missing value")),
        ("pretrain --layers 4", ("unknown flag --layers", "did you mean --model.layers?")),
        ("pretrain --loop.st 4", ("unknown flag --loop.st", "did you mean --loop.steps?")),
        ("pretrain --dtype float99", ("'float99'", "bfloat16")),
        ("pretrain --depth ten", ("--depth", "'ten'")),
        ("pretrain --preset", ("--preset", "expected one argument")),
        ("pretrain extra", ("unexpected argument 'extra'", "`hotlap pretrain --help`")),
        ("pretrain --model.smear yes", ("unexpected argument 'yes'",)),
        ("eval one two", ("unexpected argument 'two'",)),
        ("chat --sampling.temperature 1", ("did you mean --temperature?",)),
        ("bench look --minuts 3", ("--minuts",)),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_that_names_it(capsys, line, parts):
    assert_error(capsys, main(line.split()), USAGE, *parts)


def test_a_value_out_of_range_is_named_by_its_flag_or_its_place_in_the_file(work, capsys):
    assert_error(capsys, main(["pretrain", "--loop.steps", "0"]), USAGE, "error: --loop.steps 0 must be")
    assert_error(capsys, main(["pretrain", "--batch_rows=-3"]), USAGE, "error: --batch_rows -3 must be")
    assert_error(capsys, main(["chat", "--temperature", "20"]), USAGE, "error: --temperature 20")
    (work / "run.toml").write_text("[loop]\nsteps = 0\n")
    code = main(["pretrain", "--config", "run.toml"])
    assert_error(capsys, code, USAGE, "error: run.toml: loop.steps=0 must be")


@pytest.mark.parametrize("command", ["sft", "eval", "report", "chat", "export weights"])
def test_every_command_about_a_model_takes_it_as_a_word_or_a_flag(work, capsys, command):
    for given in (["none"], ["--model", "none"], ["--model=none"]):
        assert_error(capsys, main([*command.split(), *given]), NO_INPUT, "none")


@pytest.mark.parametrize("given", ["--version", "-V", "pretrain --version"])
def test_the_version_of_a_checkout_that_is_not_installed(capsys, monkeypatch, given):
    def missing(name):
        raise cli.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.importlib.metadata, "version", missing)
    assert main(given.split()) == 0
    assert capsys.readouterr().out.startswith("hotlap 0.")


def test_a_folder_of_the_same_name_that_comes_first_is_named(work):
    ours = str(Path(cli.__file__).parent)
    assert cli.shadow([ours, "elsewhere"]) is None
    assert cli.shadow([str(work / "hotlap"), ours]) == str(work / "hotlap")


def test_help_after_a_command_and_before_it(capsys):
    for given in (["help", "sft"], ["sft", "help"]):
        with pytest.raises(SystemExit) as exit:
            main(given)
        assert exit.value.code == 0 and "usage: hotlap sft" in capsys.readouterr().out


@pytest.mark.parametrize(
    "moment",
    [
        "sys.modules['hotlap.common.options'] = Interrupts()",  # while cli.py is imported
        "import hotlap.cli; hotlap.cli.read_flags = interrupt",
        "import hotlap.train.data.prepare as module; module.tokenizer_command = interrupt",
    ],
)
def test_an_interrupt_is_one_line_and_exit_code_130_from_the_first_moment(moment):
    code = (
        "import os, signal, sys, types\n"
        # which a shell has ignored if it started the tests in the background
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def interrupt(*given): os.kill(os.getpid(), signal.SIGINT)\n"
        "class Interrupts(types.ModuleType):\n"
        "    def __init__(self): pass\n"
        "    def __getattr__(self, name): interrupt()\n"
        f"{moment}\n"
        "from hotlap import cli\n"
        "raise SystemExit(cli.main(['tokenizer', '--out', 'unused.json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_debug_shows_the_traceback(work):
    with pytest.raises(FileNotFoundError):
        main(["tokenizer", "--source", "none.txt", "--debug"])


# hotlap tokenizer and hotlap data


def test_a_tokenizer_from_nothing(work, capsys):
    make = ["tokenizer", "--vocab-size", "300", "--source"]
    assert_error(capsys, main([*make, "*.text"]), NO_INPUT, "'*.text'", "name a file")
    (work / "empty.txt").write_text("\n")
    assert_error(capsys, main([*make, "empty.txt"]), BAD_DATA, "'empty.txt'", "name files with text")
    (work / "text.bz2").write_bytes(bz2.compress(b"text"))
    assert_error(capsys, main([*make, "text.bz2"]), BAD_DATA, "text.bz2", "unpack")
    (work / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert_error(capsys, main([*make, "latin.txt"]), BAD_DATA, "latin.txt", "byte 3", "--errors replace")
    assert not (work / "tokenizer.json").exists()
    assert main([*make, "latin.txt", "--errors", "replace"]) == 0


def test_a_vocabulary_that_is_too_small_or_too_large(work, capsys):
    make = ["tokenizer", "--source", "text.txt", "--vocab-size"]
    assert_error(capsys, main([*make, "100"]), USAGE, "--vocab-size 100", "267", "256 bytes")
    assert main([*make, "100000"]) == 0
    learnt = Tokenizer.load(work / "tokenizer.json").vocab_size
    assert f"merges for {learnt} tokens only" in capsys.readouterr().err and learnt < 5000


def test_a_tokenizer_is_overwritten_only_by_force(work, capsys):
    make = ["tokenizer", "--source", "text.txt", "--vocab-size", "280"]
    assert main(make) == 0
    before = (work / "tokenizer.json").read_bytes()
    capsys.readouterr()
    code = main(["tokenizer", "--source", "text.txt", "--vocab-size", "290"])
    assert_error(capsys, code, CANNOT_CREATE, "tokenizer.json exists", "--force")
    assert (work / "tokenizer.json").read_bytes() == before
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "290", "--force"]) == 0
    assert Tokenizer.load(work / "tokenizer.json").vocab_size == 290


def test_one_long_line_is_no_trouble_for_a_tokenizer(work):
    (work / "line.txt").write_text("all of this is one line " * 40_000)
    assert main(["tokenizer", "--source", "line.txt", "--vocab-size", "300"]) == 0


def test_shards_are_not_written_over_what_is_there(work, capsys):
    code = main(["data", "--source", "text.txt", "--out", "shards"])
    assert_error(capsys, code, NO_INPUT, "tokenizer.json", "hotlap tokenizer")
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "280"]) == 0
    assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
    capsys.readouterr()
    code = main(["data", "--source", "text.txt", "--out", "shards"])
    assert_error(capsys, code, CANNOT_CREATE, "shards exists", "--out")


# hotlap pretrain


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.heads", "3"], ("--model.width 32", "--model.heads 3")),
        (["--model.width", "48", "--model.heads", "1"], ("heads of 48", "32, 64")),
        (["--batch-rows", "12", "--micro-batch", "5"], ("12 rows", "1, 2, 3, 4, 6, 12")),
        (["--optim.matrix-lr", "0"], ("--optim.matrix-lr 0", "positive")),
        (["--optim.head-lr", "-1"], ("--optim.head-lr -1", "positive")),
        (["--optim.embedding-lr", "nan"], ("--optim.embedding-lr nan", "positive")),
        (["--optim.weight-decay", "inf"], ("--optim.weight-decay inf",)),
        (["--schedule.warmdown", "nan"], ("--schedule.warmdown nan", "0 to 1")),
        (["--schedule.momentum", "0.9", "nan", "0.9"], ("momentum",)),
        (["--loop.clip", "nan"], ("--loop.clip nan",)),
        (["--loop.steps", "0"], ("--loop.steps 0", "at least 1")),
        (["--seed", "-1"], ("--seed -1",)),
        (["--preset", "tinny"], ("'tinny'", "did you mean 'tiny'")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_pretraining_that_cannot_work_is_refused_before_anything_is_made(work, capsys, flags, parts):
    assert_error(capsys, pretrain_here(*flags), USAGE, *parts)
    assert not (work / "base").exists()


def test_an_unknown_key_in_a_file_gets_a_suggestion(work, capsys):
    (work / "run.toml").write_text("[optim]\nmatrix_rl = 0.1\n")
    code = pretrain_here("--config", "run.toml")
    assert_error(capsys, code, USAGE, "run.toml", "'optim.matrix_rl'", "did you mean 'optim.matrix_lr'?")


def shards(work: Path) -> Path:
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "280"]) == 0
    assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
    return work / "shards"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda raw: raw[:-2], ("bytes, but its header says",)),
        (lambda raw: raw + b"\0", ("bytes, but its header says",)),
        (lambda raw: b"", ("0 bytes",)),
        (lambda raw: b"\1" + raw[1:], ("magic",)),
        (lambda raw: raw[:4] + b"\7" + raw[5:], ("version 7",)),
        (
            lambda raw: raw[:1030] + struct.pack("<H", 280) + raw[1032:],
            ("token id 280", "byte 1030", "tokenizer"),
        ),
    ],
    ids=["truncated", "odd", "empty", "magic", "version", "id"],
)
def test_a_damaged_shard_is_named(work, capsys, damage, parts):
    path = shards(work) / "train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    code = main(["pretrain", "--data", "shards", "--out", "base", *SMALL])
    assert_error(capsys, code, BAD_DATA, "shards/train_000000.bin", *parts)


def test_data_that_is_missing_is_named(work, capsys):
    assert_error(capsys, pretrain_here("--data", "none.txt"), NO_INPUT, "'none.txt'", "name a file")
    (work / "nothing").mkdir()
    assert_error(capsys, pretrain_here("--data", "nothing"), NO_INPUT, "'nothing'")
    folder = shards(work)
    (folder / "validation_000000.bin").unlink()
    capsys.readouterr()
    flags = ["pretrain", "--data", "shards", *SMALL]
    assert_error(capsys, main([*flags, "--out", "a"]), NO_INPUT, "validation_*.bin in shards", "hotlap data")
    (folder / "tokenizer.json").unlink()
    assert_error(capsys, main([*flags, "--out", "b"]), NO_INPUT, "tokenizer.json", "--tokenizer")


def test_less_text_than_the_context_is_refused_and_can_be_corrected(work, capsys):
    (work / "short.txt").write_text("a few words")
    code = pretrain_here("--data", "short.txt")
    assert_error(capsys, code, BAD_DATA, "model.context=32", "lower --model.context")
    assert pretrain_here() == 0


def test_a_run_that_exists_is_not_overwritten(work, capsys):
    assert pretrain_here() == 0
    capsys.readouterr()
    assert_error(
        capsys, pretrain_here(), CANNOT_CREATE, "base already holds a run", "--resume", "auto", "--out"
    )
    code = pretrain_here("--resume", "auto", "--batch-rows", "6", "--model.layers", "2")
    assert_error(capsys, code, USAGE, "batch_rows: saved 4, current 6", "model.layers: saved 1, current 2")
    assert pretrain_here("--resume", "auto") == 0


def test_two_runs_in_one_directory(work, capsys):
    from hotlap.train.run.folder import run_lock

    with run_lock(work / "base"):
        assert_error(capsys, pretrain_here(), USAGE, f"in use by process {os.getpid()}")


def test_a_run_where_a_file_is(work, capsys):
    assert_error(capsys, pretrain_here("--out", "text.txt"), CANNOT_CREATE, "text.txt", "choose another")


def test_a_disk_that_is_too_small_is_named_with_both_numbers(work, capsys, monkeypatch):
    usage = shutil.disk_usage(work)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code = pretrain_here()
    assert_error(capsys, code, INPUT_OUTPUT, "needs", "bytes, and 500,000 are free")


def test_a_loss_that_explodes_names_the_step(work, capsys, monkeypatch):
    real = pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", lambda *given: (real(*given)[0] * float("nan"), {}))
    assert_error(capsys, pretrain_here(), 1, "loss nan", "at step 0", "lower learning rate")


def test_a_run_that_is_stopped_says_how_to_go_on(work, capsys, monkeypatch):
    real = stage.prefetched

    def stopped(items, device):
        for i, item in enumerate(real(items, device)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(stage, "prefetched", stopped)
        assert pretrain_here() == INTERRUPTED
        last = capsys.readouterr().err.splitlines()[-1]
        assert "after step 2 of 4" in last and "--resume" in last
    assert pretrain_here("--resume", "auto") == 0
    assert "resuming after step 2" in capsys.readouterr().err


def test_a_plain_failure_of_ours_is_called_a_bug(work, capsys, monkeypatch):
    monkeypatch.setattr(stage, "describe", lambda *given: {}["no such key"])
    assert_error(capsys, pretrain_here(), 70, "KeyError", "a bug", "--debug")

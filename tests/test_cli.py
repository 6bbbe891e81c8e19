"""The `hotlap` command: what it says, and with which exit code."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
from small_runs import MODEL_FLAGS, conversation, write_conversations, write_text

from hotlap.cli import COMMANDS, main
from hotlap.model.errors import DataError
from hotlap.model.tokenizer import Tokenizer
from hotlap.train import pretrain, sources
from hotlap.train.log import read_metrics

USAGE, BAD_DATA, NO_INPUT, CANNOT_CREATE, INPUT_OUTPUT, INTERRUPTED = 2, 65, 66, 73, 74, 130
SMALL = [*MODEL_FLAGS, "--batch-rows", "4", "--loop.steps", "4", "--dtype", "float32", "--compile", "off"]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with text.txt and talks.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    write_conversations(tmp_path / "talks.jsonl")
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model that was pretrained through the command."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.txt")
    assert pretrain_here("--run", str(folder / "base"), "--data", str(folder / "text.txt")) == 0
    return folder / "base"


def pretrain_here(*flags: str) -> int:
    return main(
        ["pretrain", "--data", "text.txt", "--tokenizer", "characters", "--run", "base", *SMALL, *flags]
    )


def sft_here(base: Path, *flags: str) -> int:
    fixed = ["--loop.steps", "2", "--batch-rows", "4", "--dtype", "float32", "--compile", "off"]
    return main(["sft", "--base", str(base), "--data", "talks.jsonl", "--run", "sft", *fixed, *flags])


def assert_error(capsys, code: int, expected: int, *parts: str) -> None:
    """The command failed with this code and one line, which holds the parts: what was given, what to try."""
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == expected and len(errors) == 1 and lines[-1] == errors[0], printed.err
    assert "Traceback" not in printed.err + printed.out
    for part in parts:
        assert part in errors[0]


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
    with pytest.raises(SystemExit) as exit:
        main(["pretrain", "--batch-rowz", "3"])
    printed = capsys.readouterr()
    assert exit.value.code == 2 and "--batch-rows" in printed.err and "Traceback" not in printed.err


def test_debug_shows_the_traceback(work):
    with pytest.raises(FileNotFoundError):
        main(["tokenizer", "--source", "none.txt", "--debug"])


# hotlap tokenizer and hotlap data


def test_a_tokenizer_from_nothing(work, capsys):
    make = ["tokenizer", "--vocab-size", "300", "--source"]
    assert_error(capsys, main([*make, "*.text"]), NO_INPUT, "'*.text'", "name a file")
    (work / "empty.txt").write_text("\n")
    assert_error(capsys, main([*make, "empty.txt"]), BAD_DATA, "'empty.txt'", "name files with text")
    (work / "text.gz").write_bytes(gzip.compress(b"text"))
    assert_error(capsys, main([*make, "text.gz"]), BAD_DATA, "text.gz", "unpack it")
    (work / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert_error(capsys, main([*make, "latin.txt"]), BAD_DATA, "latin.txt", "byte 3", "--errors replace")
    assert not (work / "tokenizer.json").exists()
    assert main([*make, "latin.txt", "--errors", "replace"]) == 0


def test_a_vocabulary_that_is_too_small_or_too_large(work, capsys):
    make = ["tokenizer", "--source", "text.txt", "--vocab-size"]
    assert_error(capsys, main([*make, "100"]), USAGE, "vocab_size=100", "267", "256 bytes")
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
        (["--model.heads", "3"], ("width=32", "heads=3")),
        (["--model.width", "48", "--model.heads", "1"], ("heads of 48", "32, 64")),
        (["--batch-rows", "12", "--micro-rows", "5"], ("12 rows", "1, 2, 3, 4, 6, 12")),
        (["--optim.matrix-lr", "0"], ("matrix_lr=0.0", "positive")),
        (["--optim.head-lr", "-1"], ("head_lr=-1.0", "positive")),
        (["--optim.embedding-lr", "nan"], ("embedding_lr=nan", "positive")),
        (["--optim.weight-decay", "inf"], ("weight_decay=inf",)),
        (["--schedule.warmdown", "nan"], ("warmdown=nan", "0 to 1")),
        (["--schedule.momentum", "0.9", "nan", "0.9"], ("momentum",)),
        (["--loop.clip", "nan"], ("clip=nan",)),
        (["--loop.steps", "0"], ("steps=0", "at least 1")),
        (["--seed", "-1"], ("seed=-1",)),
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
    assert_error(capsys, code, USAGE, "run.toml", "'matrix_rl'", "did you mean 'matrix_lr'?")


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
    code = main(["pretrain", "--data", "shards", "--run", "base", *SMALL])
    assert_error(capsys, code, BAD_DATA, "shards/train_000000.bin", *parts)


def test_data_that_is_missing_is_named(work, capsys):
    assert_error(capsys, pretrain_here("--data", "none.txt"), NO_INPUT, "'none.txt'", "name a file")
    (work / "nothing").mkdir()
    assert_error(capsys, pretrain_here("--data", "nothing"), NO_INPUT, "'nothing'")
    folder = shards(work)
    (folder / "validation_000000.bin").unlink()
    capsys.readouterr()
    flags = ["pretrain", "--data", "shards", *SMALL]
    assert_error(capsys, main([*flags, "--run", "a"]), NO_INPUT, "validation_*.bin in shards", "hotlap data")
    (folder / "tokenizer.json").unlink()
    assert_error(capsys, main([*flags, "--run", "b"]), NO_INPUT, "tokenizer.json", "--tokenizer")


def test_less_text_than_the_context_is_refused_and_can_be_corrected(work, capsys):
    (work / "short.txt").write_text("a few words")
    code = pretrain_here("--data", "short.txt")
    assert_error(capsys, code, BAD_DATA, "model.context=32", "lower --model.context")
    assert pretrain_here() == 0


def test_a_run_that_exists_is_not_overwritten(work, capsys):
    assert pretrain_here() == 0
    capsys.readouterr()
    assert_error(capsys, pretrain_here(), CANNOT_CREATE, "base holds a run already", "--resume", "--run")
    code = pretrain_here("--resume", "--loop.steps", "6", "--model.layers", "2")
    assert_error(capsys, code, USAGE, "loop.steps: saved 4, current 6", "model.layers: saved 1, current 2")
    assert pretrain_here("--resume") == 0


def test_two_runs_in_one_directory(work, capsys):
    from hotlap.train.runs import run_lock

    with run_lock(work / "base"):
        assert_error(capsys, pretrain_here(), USAGE, f"in use by process {os.getpid()}")


def test_a_run_where_a_file_is(work, capsys):
    assert_error(capsys, pretrain_here("--run", "text.txt"), CANNOT_CREATE, "text.txt", "name another")


def test_a_disk_that_is_too_small_is_named_with_both_numbers(work, capsys, monkeypatch):
    usage = shutil.disk_usage(work)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code = pretrain_here()
    assert_error(capsys, code, INPUT_OUTPUT, "MB, and 0 MB are free")


def test_a_loss_that_explodes_names_the_step(work, capsys, monkeypatch):
    real = pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", lambda *given: real(*given) * float("nan"))
    assert_error(capsys, pretrain_here(), 1, "loss nan", "at step 0", "lower learning rate")


def test_a_run_that_is_stopped_says_how_to_go_on(work, capsys, monkeypatch):
    real = pretrain.prefetch

    def stopped(items):
        for i, item in enumerate(real(items)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "prefetch", stopped)
        assert pretrain_here() == INTERRUPTED
        last = capsys.readouterr().err.splitlines()[-1]
        assert "after step 2 of 4" in last and "--resume" in last
    assert pretrain_here("--resume") == 0
    assert "going on after step 2" in capsys.readouterr().err


def test_a_plain_failure_of_ours_is_called_a_bug(work, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "describe", lambda *given: {}["no such key"])
    assert_error(capsys, pretrain_here(), 70, "KeyError", "a bug", "--debug")


# hotlap sft


GOOD = json.dumps({"messages": conversation("square", "is 4.")})


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([GOOD, "{"], ("talks.jsonl:2", "not JSON")),
        ([GOOD, GOOD, '{"text": "a"}'], ("talks.jsonl:3", '"messages"')),
        ([json.dumps({"messages": conversation("a", "b")[:1]})], ("talks.jsonl:1", "end with the assistant")),
        ([json.dumps({"messages": conversation("a", "b")[::-1]})], ("talks.jsonl:1", "system or user")),
        ([json.dumps({"messages": conversation("a", "")})], ("talks.jsonl:1", "says nothing")),
        ([json.dumps({"messages": conversation("square " * 30, "is")})], ("context of 32", "shorten")),
        ([""], ("talks.jsonl", "holds no conversation")),
    ],
)
def test_conversations_that_cannot_be_used_are_named(work, capsys, base, lines, parts):
    (work / "talks.jsonl").write_text("\n".join(lines))
    assert_error(capsys, sft_here(base), BAD_DATA, *parts)
    assert not (work / "sft").exists()


def test_conversations_that_are_missing(work, capsys, base):
    code = sft_here(base, "--data", "none.jsonl")
    assert_error(capsys, code, NO_INPUT, "none.jsonl", "or `tasks`")


def test_a_base_model_that_is_missing_lists_those_that_are_there(work, capsys, base):
    assert_error(capsys, sft_here(work / "none"), NO_INPUT, "no model at", "none found under runs/")
    shutil.copytree(base, work / "runs" / "mine")
    assert_error(capsys, sft_here(work / "none"), NO_INPUT, "found: runs/mine")


def test_a_base_model_without_chat_tokens(work, capsys, base):
    folder = work / "mute"
    shutil.copytree(sorted((base / "checkpoints").iterdir())[-1], folder)
    (folder / "manifest.json").unlink()
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"] = definition["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert_error(capsys, sft_here(folder), BAD_DATA, "mute/tokenizer.json", "<|system_start|>")


def test_a_base_model_that_has_changed_on_disk(work, capsys, base):
    shutil.copytree(base, work / "copy")
    path = sorted((work / "copy" / "checkpoints").iterdir())[-1] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 4
    path.write_bytes(raw)
    assert_error(capsys, sft_here(work / "copy"), BAD_DATA, "model.safetensors has changed")
    assert_error(capsys, main(["eval", "--model", "copy"]), BAD_DATA, "model.safetensors has changed")


def test_fine_tuning_on_a_file_of_messages(work, capsys, base):
    with open("talks.jsonl", "a") as file:
        file.write(json.dumps({"messages": conversation("square " * 30, "is")}) + "\n")
    assert sft_here(base) == 0
    assert re.search(r"1 of \d+ conversations are longer than 32 tokens", capsys.readouterr().err)
    assert [m["step"] for m in read_metrics(Path("sft/metrics.jsonl"))] == [0, 1]
    assert Path("sft/report.md").exists() and Path("sft/curves.png").exists()
    (work / "talks.jsonl").write_text("\n".join([GOOD] * 5))
    code = sft_here(base, "--resume")
    assert_error(capsys, code, USAGE, "started on other conversations than talks.jsonl")


def test_a_run_goes_on_with_the_tokenizer_it_started_from(work, capsys, base):
    assert sft_here(base) == 0
    tokenizer = json.loads((work / "sft" / "tokenizer.json").read_text())
    (work / "sft" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    capsys.readouterr()
    assert_error(capsys, sft_here(base, "--resume"), USAGE, "sft/tokenizer.json has sha256", "base tokenizer")


def test_conversations_on_both_sides_are_counted(work, capsys, base):
    (work / "talks.jsonl").write_text(GOOD)
    assert sft_here(base) == 0
    assert "1 conversations are in training and in validation" in capsys.readouterr().err


# hotlap eval, report, and the whole way


def test_scores_that_cannot_be_had(work, capsys, base):
    code = main(["eval", "--model", str(base), "--tasks", "facts", "sums"])
    assert_error(capsys, code, USAGE, "'sums'", "facts, arithmetic, spelling")
    assert_error(capsys, main(["eval", "--model", "none"]), NO_INPUT, "no model at none")
    code = main(["eval", "--model", str(base), "--out", "text.txt"])
    assert_error(capsys, code, CANNOT_CREATE, "text.txt exists", "--out")
    assert_error(capsys, main(["report", "--run", "none"]), NO_INPUT, "metrics.jsonl in none")


def test_from_text_to_an_answer(work, capsys, monkeypatch):
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "300"]) == 0
    assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
    assert main(["pretrain", "--data", "shards", "--run", "base", *SMALL, "--model.context", "64"]) == 0
    assert main(["report", "--run", "base"]) == 0
    assert sft_here(Path("base")) == 0
    monkeypatch.setattr("hotlap.train.tasks.arithmetic.held_out", lambda count: [("2 + 3?", "2 + 3 = 5")])
    assert main(["eval", "--model", "sft", "--tasks", "arithmetic", "--out", "scores.json"]) == 0
    assert "arithmetic" in json.loads(Path("scores.json").read_text())["scores"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    capsys.readouterr()
    assert main(["chat", "sft", "-p", "square of 3", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert "parameters on cpu" in printed.err and printed.out.endswith("\n") and "error" not in printed.err
    assert main(["chat", "base", "-p", "The square", "--max-tokens", "8"]) == 0
    assert "a base model" in capsys.readouterr().err


def test_a_source_that_fails_in_the_middle_leaves_nothing_that_looks_whole(work, capsys, monkeypatch):
    def failing(source, errors="strict"):
        yield "one document"
        raise DataError("the second document is damaged; repair it")

    monkeypatch.setattr(sources, "documents", failing)
    assert_error(capsys, pretrain_here(), BAD_DATA, "the second document")
    assert not list(work.glob("base/data/*"))

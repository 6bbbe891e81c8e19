"""The commands that take a model: fine-tuning, scores, reports, and the whole way."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers.commands import (
    BAD_DATA,
    CANNOT_CREATE,
    NO_INPUT,
    SMALL,
    USAGE,
    assert_error,
    pretrain_here,
    sft_here,
)
from helpers.small_runs import conversation, write_text

from hotlap.cli import main
from hotlap.common.errors import DataError
from hotlap.train.data import sources
from hotlap.train.run.metrics import read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model that was pretrained through the command."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.txt")
    assert pretrain_here("--out", str(folder / "base"), "--data", str(folder / "text.txt")) == 0
    return folder / "base"


GOOD = json.dumps({"messages": conversation("square", "is 4.")})


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([GOOD, "{]"], ("talks.jsonl:2", "not JSON")),
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
    assert_error(capsys, code, NO_INPUT, "none.jsonl", "or tasks, facts, ")


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
    path = next(sorted((work / "copy" / "checkpoints").iterdir())[-1].glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 4
    path.write_bytes(raw)
    assert_error(capsys, sft_here(work / "copy"), BAD_DATA, f"{path.name} has changed")
    assert_error(capsys, main(["eval", "--model", "copy"]), BAD_DATA, f"{path.name} has changed")


def test_fine_tuning_on_a_file_of_messages(work, capsys, base):
    with open("talks.jsonl", "a") as file:
        file.write(json.dumps({"messages": conversation("square " * 30, "is")}) + "\n")
    assert sft_here(base) == 0
    assert re.search(
        r"left out: 1 of \d+ conversations are longer than .* 32 tokens", capsys.readouterr().err
    )
    assert [m["step"] for m in read_metrics(Path("sft/metrics.jsonl"))] == [0, 1]
    assert Path("sft/report.md").exists() and Path("sft/curves.png").exists()
    (work / "talks.jsonl").write_text("\n".join([GOOD] * 5))
    code = sft_here(base, "--resume", "auto")
    assert_error(capsys, code, USAGE, "started on other data than talks.jsonl")


def test_a_run_goes_on_with_the_tokenizer_it_started_from(work, capsys, base):
    assert sft_here(base) == 0
    tokenizer = json.loads((work / "sft" / "tokenizer.json").read_text())
    (work / "sft" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    capsys.readouterr()
    assert_error(
        capsys, sft_here(base, "--resume", "auto"), USAGE, "sft/tokenizer.json has sha256", "base tokenizer"
    )


def test_conversations_on_both_sides_are_counted(work, capsys, base):
    (work / "talks.jsonl").write_text(GOOD)
    assert sft_here(base) == 0
    assert "1 conversations are in both the training and the validation split" in capsys.readouterr().err


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
    assert main(["pretrain", "--data", "shards", "--out", "base", *SMALL, "--model.context", "64"]) == 0
    assert main(["report", "--run", "base"]) == 0
    assert sft_here(Path("base")) == 0
    monkeypatch.setattr(
        "hotlap.train.data.tasks.arithmetic.held_out", lambda count: [("2 + 3?", "2 + 3 = 5")]
    )
    assert main(["eval", "--model", "sft", "--tasks", "arithmetic", "--out", "scores.json"]) == 0
    assert "arithmetic" in json.loads(Path("scores.json").read_text())["scores"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    capsys.readouterr()
    assert main(["chat", "sft", "-p", "square of 3", "--max-tokens", "8", "--seed", "0"]) == 0
    printed = capsys.readouterr()
    assert "parameters on cpu" in printed.err and printed.out.endswith("\n") and "error" not in printed.err
    assert main(["chat", "base", "-p", "The square", "--max-tokens", "8", "--seed", "0"]) == 0
    assert "base model: " in capsys.readouterr().err


def test_a_source_that_fails_in_the_middle_leaves_nothing_that_looks_whole(work, capsys, monkeypatch):
    def failing(source, errors="strict"):
        yield "one document"
        raise DataError("the second document is damaged; repair it")

    monkeypatch.setattr(sources, "documents", failing)
    assert_error(capsys, pretrain_here(), BAD_DATA, "the second document")
    assert not list(work.glob("base/data/*"))

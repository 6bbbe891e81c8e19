"""A table of bad input by command: each is one line at once that says what to do, and leaves nothing behind.

A row is (arguments, what makes the files that it needs or None, exit code, pattern of the line). It runs in a
folder with text.txt, talks.jsonl, tokenizer.json, shards/, base/ and sft/ (runs) and model/ (an export).
"""
# ruff: noqa: E501  a row is one line

import io
import json
import re
import shlex
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, SMALL, USAGE, sft_here
from helpers.small_runs import write_conversations, write_text

from hotlap.cli import main

Builder = Callable[[Path], object]
PRETRAIN = "pretrain --data text.txt --tokenizer characters --out new " + " ".join(SMALL)
SFT = "sft --base base --data talks.jsonl --out new --loop.steps 2 --batch-rows 4"
MANY = 10**12
FAR = 10**30


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with one of everything."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_text(Path("text.txt"))
        write_conversations(Path("talks.jsonl"))
        commands = [
            ["tokenizer", "--source", "text.txt", "--vocab-size", "280"],
            ["data", "--source", "text.txt", "--out", "shards"],
            ["pretrain", "--data", "text.txt", "--tokenizer", "characters", "--out", "base", *SMALL],
        ]
        assert [main(command) for command in commands] == [0, 0, 0] and sft_here(Path("base")) == 0
        assert main(["export", "weights", "--model", "sft", "--out", "model"]) == 0
    return folder


# Files that are wrong.


def text(name: str, content: str | bytes) -> Builder:
    """A file with this content."""
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def model(name: str, content: str | bytes) -> Builder:
    """The folder `bad`, a copy of the exported model with one file replaced."""

    def build(folder: Path) -> None:
        shutil.copytree(folder / "model", folder / "bad")
        text(name, content)(folder / "bad")

    return build


def config(**fields: object) -> Builder:
    """The folder `bad`, whose config.json claims something else."""

    def build(folder: Path) -> None:
        saved = json.loads((folder / "model" / "config.json").read_text())
        model("config.json", json.dumps(saved | fields))(folder)

    return build


def tokenizer(change: Callable[[dict], object]) -> Builder:
    """The folder `bad`, whose tokenizer.json is changed."""

    def build(folder: Path) -> None:
        saved = json.loads((folder / "model" / "tokenizer.json").read_text())
        change(saved)
        model("tokenizer.json", json.dumps(saved))(folder)

    return build


def shard(change: Callable[[bytes], bytes]) -> Builder:
    """The folder `odd`, whose training shard is changed."""

    def build(folder: Path) -> None:
        shutil.copytree(folder / "shards", folder / "odd")
        path = folder / "odd" / "train_000000.bin"
        path.write_bytes(change(path.read_bytes()))

    return build


def checkpoint(name: str, change: Callable[[bytes], bytes]) -> Builder:
    """The run `bad`, a copy of base, with a file of its last checkpoint changed."""

    def build(folder: Path) -> None:
        shutil.copytree(folder / "base", folder / "bad")
        path = sorted((folder / "bad" / "checkpoints").iterdir())[-1] / name
        path.write_bytes(change(path.read_bytes()))

    return build


CHAT = "chat bad -p square --max-tokens 2"
DEEP = "[" * 200_000

ROWS: list[tuple[str, Builder | None, int, str]] = [
    # commands
    ("zzz", None, USAGE, r"unknown hotlap command: 'zzz'; known: speedrun"),
    ("pretrian", None, USAGE, r"did you mean 'pretrain'\?"),
    ("speedrun tyny", None, USAGE, r"did you mean 'tiny'\?"),
    ("bench kernel", None, USAGE, r"did you mean 'kernels'\?"),
    ("export weight", None, USAGE, r"did you mean 'weights'\?"),
    # tokenizer
    ("tokenizer --source none.txt --out new", None, NO_INPUT, r"'none\.txt'.*name a file"),
    ("tokenizer --source *.none --out new", None, NO_INPUT, r"'\*\.none'"),
    ("tokenizer --source a.txt --out new", text("a.txt", "\n"), BAD_DATA, r"'a\.txt'.*name files with text"),
    ("tokenizer --source a.gz --out new", text("a.gz", b"\x1f\x8b\x08\0"), BAD_DATA, r"a\.gz.*unpack it"),
    ("tokenizer --source a.txt --out new", text("a.txt", b"caf\xe9 "), BAD_DATA, r"a\.txt.*byte 3.*--errors replace"),
    ("tokenizer --source text.txt", None, CANNOT_CREATE, r"tokenizer\.json exists.*--force"),
    ("tokenizer --source text.txt --out none/new", None, NO_INPUT, r"no folder none"),
    ("tokenizer --source text.txt --out new --vocab-size 100", None, USAGE, r"vocab_size=100 is less than 267"),
    ("tokenizer --source text.txt --out new --vocab-size -3", None, USAGE, r"vocab_size=-3 must be at least 1"),
    (f"tokenizer --source text.txt --out new --vocab-size {MANY}", None, USAGE, rf"vocab_size={MANY} needs at least .* GB"),
    (f"tokenizer --source text.txt --out new --vocab-size {FAR}", None, USAGE, rf"vocab_size={FAR} must be .*less than 2\^63"),
    ("tokenizer --source text.txt --out new --max-chars 0", None, USAGE, r"max_chars=0 must be at least 1"),
    # data
    ("data --source text.txt --out shards", None, CANNOT_CREATE, r"shards exists.*--out"),
    ("data --source text.txt --out new --tokenizer none.json", None, NO_INPUT, r"none\.json.*hotlap tokenizer"),
    ("data --source text.txt --out new --shards -1", None, USAGE, r"shards=-1 must be at least 1"),
    ("data --source text.txt", None, USAGE, r"no name for the data of text\.txt.*--out"),
    ("data --source text.txt --out new --tokenizer a.json", text("a.json", "[]"), BAD_DATA, r"a\.json is not a hotlap tokenizer"),
    ("data --source text.txt --out new --tokenizer a.json", text("a.json", DEEP), BAD_DATA, r"a\.json is not a hotlap tokenizer"),
    # pretrain: flags
    (f"{PRETRAIN} --preset tinny", None, USAGE, r"unknown preset: 'tinny'; did you mean 'tiny'"),
    (f"{PRETRAIN} --preset tiny --depth 4", None, USAGE, r"--preset and --depth exclude each other"),
    (f"{PRETRAIN} --config none.toml", None, NO_INPUT, r"no configuration file none\.toml"),
    (f"{PRETRAIN} --config a.toml", text("a.toml", "loop.steps ="), USAGE, r"a\.toml is not TOML"),
    (f"{PRETRAIN} --config a.toml", text("a.toml", "loop.stepz = 3"), USAGE, r"'loop\.stepz'; did you mean 'loop\.steps'"),
    (f"{PRETRAIN} --config a.toml", text("a.toml", 'loop.steps = "x"'), USAGE, r"a\.toml: loop\.steps='x'"),
    (f"{PRETRAIN} --model.heads 3", None, USAGE, r"width=32 is not a multiple of heads=3"),
    (f"{PRETRAIN} --model.window-pattern SX", None, USAGE, r"window_pattern='SX'"),
    (f"{PRETRAIN} --batch-rows 12 --micro-batch 5", None, USAGE, r"12 rows.*micro_batch may be 1, 2, 3, 4, 6, 12"),
    (f"{PRETRAIN} --micro-batch many", None, USAGE, r"micro_batch='many' must be a number"),
    (f"{PRETRAIN} --optim.matrix-lr nan", None, USAGE, r"matrix_lr=nan must be positive"),
    (f"{PRETRAIN} --loop.minutes inf", None, USAGE, r"minutes=inf must be 0 \(off\) or more"),
    (f"{PRETRAIN} --loop.minutes -1", None, USAGE, r"minutes=-1\.0 must be 0 \(off\) or more"),
    (f"{PRETRAIN} --loop.steps 0", None, USAGE, r"steps=0 must be at least 1"),
    (f"{PRETRAIN} --loop.steps {FAR}", None, USAGE, r"steps=1000.* must be at least 1, and less than 2\^63"),
    (f"{PRETRAIN} --seed -1", None, USAGE, r"seed=-1 must be at least 0"),
    (f"{PRETRAIN} --seed {2**64}", None, USAGE, r"seed=18446744073709551616 must be .*less than 2\^63"),
    (f"{PRETRAIN} --schedule.warmdown 2", None, USAGE, r"warmdown=2\.0 must be a number from 0 to 1"),
    (f"{PRETRAIN} --validation-tokens -1", None, USAGE, r"validation_tokens=-1 must be 0 \(all\) or more"),
    (f"{PRETRAIN} --validation-tokens {FAR}", None, USAGE, r"validation_tokens=1000.*less than 2\^63"),
    # pretrain: what cannot fit in memory
    (f"{PRETRAIN} --model.context {MANY}", None, USAGE, rf"context of {MANY} tokens needs at least .* GB.*--model\.context"),
    (f"{PRETRAIN} --model.layers {MANY}", None, USAGE, r"training .* parameters needs at least .* GB.*--model\.layers"),
    (f"{PRETRAIN} --model.width {32 * MANY} --model.heads {MANY} --model.kv-heads {MANY}", None, USAGE, r"training .* GB.*--model\.width"),
    (f"{PRETRAIN} --batch-rows {MANY}", None, USAGE, rf"micro-batch of {MANY} rows of 32 tokens needs at least .* GB.*--micro-batch"),
    (f"{PRETRAIN} --batch-rows {MANY} --micro-batch 1", None, USAGE, rf"a step of {MANY} rows .*--batch-rows"),
    (f"{PRETRAIN} --tokenizer bpe --model.vocab-size {MANY}", None, USAGE, rf"vocab_size={MANY} needs at least .* GB"),
    ("pretrain --data text.txt --out new --depth 100000", None, USAGE, r"depth=100000 must be from 1 to 1000"),
    ("pretrain --data text.txt --out new --depth 900", None, USAGE, r"training 3.*e\+13 parameters needs at least .*lower --depth"),
    ("pretrain --data text.txt --out new --depth -4", None, USAGE, r"depth=-4 must be from 1"),
    # pretrain: data
    (f"{PRETRAIN} --data none.txt", None, NO_INPUT, r"'none\.txt'.*name a file"),
    (f"{PRETRAIN} --data a", lambda folder: (folder / "a").mkdir(), NO_INPUT, r"'a'"),
    (f"{PRETRAIN} --tokenizer none.json", None, NO_INPUT, r"none\.json"),
    (f"{PRETRAIN} --out text.txt", None, CANNOT_CREATE, r"text\.txt cannot be a run's directory"),
    (f"{PRETRAIN} --out shards", None, CANNOT_CREATE, r"shards holds .* and no run.*--out"),
    (f"{PRETRAIN} --out base", None, CANNOT_CREATE, r"base already holds a run.*--resume auto.*--out"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: raw[:-2]), BAD_DATA, r"train_000000\.bin: .* but its header says"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: raw + b"\0"), BAD_DATA, r"train_000000\.bin: .* but its header says"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: b""), BAD_DATA, r"train_000000\.bin: 0 bytes"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: b"\1" + raw[1:]), BAD_DATA, r"train_000000\.bin: magic"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: raw[:4] + b"\7" + raw[5:]), BAD_DATA, r"version 7"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: raw[:8] + b"\xff" * 4 + raw[12:]), BAD_DATA, r"header says -1 tokens"),
    (f"{PRETRAIN} --data odd --tokenizer tokenizer.json", shard(lambda raw: raw[:1030] + struct.pack("<H", 280) + raw[1032:]), BAD_DATA, r"token id 280 at byte 1030"),
    # sft
    (SFT.replace("base base", "base none"), None, NO_INPUT, r"no model at none"),
    (f"{SFT} --data none.jsonl", None, NO_INPUT, r"none\.jsonl"),
    (f"{SFT} --data a.jsonl", text("a.jsonl", "{"), BAD_DATA, r"a\.jsonl:1.*not JSON"),
    (f"{SFT} --data a.jsonl", text("a.jsonl", ""), BAD_DATA, r"a\.jsonl.*holds no conversation"),
    (f"{SFT} --epochs nan", None, USAGE, r"epochs=nan must be 0"),
    (f"{SFT} --epochs 1e300", None, USAGE, r"epochs=1e\+300 must be 0 .*less than 2\^63"),
    (f"{SFT} --epochs 1e18", None, USAGE, r"epochs=1e\+18 are .* steps"),
    (f"{SFT} --batch-rows {MANY}", None, USAGE, rf"micro-batch of {MANY} rows .*needs at least .* GB"),
    (SFT.replace("base base", "base bad"), config(context=2_000_000_000_000), USAGE, r"bad/config\.json: a context of 2000000000000 tokens needs"),
    (SFT.replace("base base", "base bad"), config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of .* parameters, but the tensors"),
    # eval, report, export
    ("eval --model none", None, NO_INPUT, r"no model at none"),
    ("eval --model sft --tasks sums", None, USAGE, r"unknown task 'sums'; known: bpb"),
    ("eval --model sft --tasks bpb", None, USAGE, r"bpb needs text.*--data"),
    ("eval --model base --tasks facts", None, USAGE, r"base is a base model, and facts need a chat model"),
    ("eval --model sft --out text.txt", None, CANNOT_CREATE, r"text\.txt exists.*--out"),
    ("eval --model sft --out none/new", None, NO_INPUT, r"no folder none"),
    ("eval --model sft --max-per-task -1", None, USAGE, r"max_per_task=-1 must be 0 \(all\) or more"),
    ("eval --model base --tasks bpb --data shards", None, USAGE, r"shards were made with another tokenizer|another tokenizer"),
    ("eval --model bad --tasks samples", config(context=2_000_000_000_000), USAGE, r"a context of 2000000000000 tokens needs"),
    ("report --run none", None, NO_INPUT, r"no metrics\.jsonl in none"),
    ("export weights --model none --out new", None, NO_INPUT, r"no model at none"),
    ("export weights --model sft --out base", None, CANNOT_CREATE, r"base exists already.*--out"),
    ("export weights --model bad --out new", config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of"),
    ("export weights --model bad --out new", checkpoint("manifest.json", lambda raw: DEEP.encode()), BAD_DATA, r"cannot read bad/.*manifest\.json"),
    ("export weights --model bad --out new", checkpoint("manifest.json", lambda raw: b"[]"), BAD_DATA, r"cannot read bad/.*manifest\.json"),
    ("export weights --model bad --out new", checkpoint("manifest.json", lambda raw: raw[:-3]), BAD_DATA, r"manifest\.json"),
    ("export weights --model bad --out new", checkpoint("tokenizer.json", lambda raw: raw + b" "), BAD_DATA, r"tokenizer\.json is missing or not"),
    # chat
    ("chat none -p a", None, NO_INPUT, r"no model at none"),
    ("chat sft -p a --temperature nan", None, USAGE, r"temperature=nan must be a number from 0 to 10"),
    ("chat sft -p a --temperature -1", None, USAGE, r"temperature=-1\.0 must be a number from 0 to 10"),
    ("chat sft -p a --top-k -1", None, USAGE, r"top_k=-1 must be 0 \(off\) or more"),
    ("chat sft -p a --max-tokens 0", None, USAGE, r"max_tokens=0 must be at least 1"),
    (f"chat sft -p a --max-tokens {FAR}", None, USAGE, r"max_tokens=1000.* less than 2\^63"),
    ("chat sft -p a --seed -1", None, USAGE, r"seed=-1 must be at least 0"),
    (f"chat sft -p a --seed {FAR}", None, USAGE, r"seed=1000.* less than 2\^63"),
    (CHAT, config(context=2_000_000_000_000), USAGE, r"bad/config\.json: a context of 2000000000000 tokens needs at least .* GB"),
    (CHAT, config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of .* parameters, but the tensors there have"),
    (CHAT, config(vocab_size=MANY), BAD_DATA, r"bad/config\.json is of a model of"),
    (CHAT, config(layers=2), BAD_DATA, r"bad does not fit the model"),
    (CHAT, config(layers="1"), BAD_DATA, r"config\.json .*layers='1' must be of type int"),
    (CHAT, config(layers=[1]), BAD_DATA, r"layers=\[1\] must be of type int"),
    (CHAT, config(layers=None), BAD_DATA, r"layers=None must be of type int"),
    (CHAT, config(layers=True), BAD_DATA, r"layers=True must be of type int"),
    (CHAT, config(layers=1e3), BAD_DATA, r"layers=1000\.0 must be of type int"),
    (CHAT, config(layers=-1), BAD_DATA, r"layers=-1 must be at least 1"),
    (CHAT, config(softcap=float("nan")), BAD_DATA, r"softcap=nan must be 0 \(off\) or more"),
    (CHAT, config(dropout=0.1), BAD_DATA, r"unknown model field 'dropout'"),
    (CHAT, model("config.json", '{"layers": 1, "layers": 2}'), BAD_DATA, r"config\.json is not JSON: 'layers' is there twice"),
    (CHAT, model("config.json", "[1, 2]"), BAD_DATA, r"config\.json holds no JSON object"),
    (CHAT, model("config.json", DEEP), BAD_DATA, r"config\.json is nested too deeply"),
    (CHAT, model("config.json", ""), BAD_DATA, r"config\.json is not JSON"),
    (CHAT, model("config.json", b"\xff\xfe{"), BAD_DATA, r"config\.json is not JSON"),
    (CHAT, model("tokenizer.json", DEEP), BAD_DATA, r"bad/tokenizer\.json is not a hotlap tokenizer\.json"),
    (CHAT, model("tokenizer.json", ""), BAD_DATA, r"bad/tokenizer\.json is not a hotlap tokenizer\.json"),
    (CHAT, tokenizer(lambda t: t["model"].update(vocab="x")), BAD_DATA, r"bad/tokenizer\.json is not a hotlap"),
    (CHAT, tokenizer(lambda t: t["added_tokens"][0].update(id="5")), BAD_DATA, r"tokenizer\.json.*id '5' is not a whole number"),
    (CHAT, tokenizer(lambda t: t["added_tokens"][0].update(id=10**30)), BAD_DATA, r"special ids do not follow"),
    (CHAT, tokenizer(lambda t: t["model"].update(type="Unigram")), BAD_DATA, r"'Unigram'; it must be BPE or WordLevel"),
    (CHAT, tokenizer(lambda t: t.update(added_tokens=t["added_tokens"][:1])), BAD_DATA, r"the tokenizer has no <\|system_start\|>"),
    (CHAT, model("state.json", "[]"), BAD_DATA, r"state\.json holds no JSON object"),
    (CHAT, model("state.json", '{"stage": 3}'), BAD_DATA, r"state\.json: stage=3"),
    (CHAT, model("model.safetensors", b""), BAD_DATA, r"cannot read bad/model\.safetensors"),
    (CHAT, model("model.safetensors", b"\xff" * 8 + b"{}"), BAD_DATA, r"cannot read bad/model\.safetensors"),
    # sweeps, scaling, ablations, speedruns
    ("sweep --preset tinny --out new", None, USAGE, r"did you mean 'tiny'"),
    ("sweep --seeds 0 --out new", None, USAGE, r"seeds=0 must be at least 1"),
    ("sweep --seconds nan --out new", None, USAGE, r"seconds=nan must be 0"),
    ("sweep --variants model.smear --out new", None, USAGE, r"'model\.smear' is not a string of TOML"),
    ("scaling --depths 12 --out new", None, USAGE, r"depths=\[12\] must be at least two"),
    ("scaling --depths 1 100000 --out new", None, USAGE, r"depth=100000 must be from 1"),
    (f"scaling --depths 1 2 --context {MANY} --data text.txt --out new", None, USAGE, rf"context={MANY} must be at most"),
    ("scaling --depths 1 900 --data text.txt --out new", None, USAGE, r"training .* parameters needs at least"),
    ("scaling --depths 1 2 --ratio 1e-18 --data text.txt --out new", None, USAGE, r"ratio=1e-18 gives 0 steps"),
    (f"sweep --base model.context={MANY} --out new", None, USAGE, rf"a context of {MANY} tokens needs at least"),
    (f"sweep --variants batch_rows={MANY} --out new", None, USAGE, rf"a micro-batch of {MANY} rows"),
    (f"ablations --base model.layers={MANY} --only GELU --out new", None, USAGE, r"training .* parameters needs at least"),
    ("scaling --ratio nan --out new", None, USAGE, r"ratio=nan must be positive"),
    ("scaling --budget-flops inf --out new", None, USAGE, r"budget_flops=inf must be"),
    ("ablations --only smeer --out new", None, USAGE, r"unknown ablation: 'smeer'"),
    ("ablations --seeds -1 --out new", None, USAGE, r"seeds=-1 must be at least 1"),
    ("speedrun minutes --minutes 0 --out new", None, USAGE, r"minutes=0\.0 must be positive"),
    ("speedrun gpt2-124m --runs 0 --out new", None, USAGE, r"runs=0 must be a number from 1"),
    ("speedrun gpt2-grade --depth 0 --out new", None, USAGE, r"depth=0 must be from 1 to 1000"),
    # bench
    ("bench kernels --rows -1 --out new", None, USAGE, r"rows=-1 must be 0"),
    (f"bench kernels --rows {2048 * MANY} --out new", None, USAGE, r"rows=2048000000000000 needs at least .* GB"),
    (f"bench training --models tiny --rows {MANY} --out new", None, USAGE, rf"tiny with --rows {MANY} needs at least .*lower --rows"),
    (f"bench training --models tiny --rows 1 --steps {MANY} --out new", None, USAGE, r"random tokens of .* needs at least .*--steps"),
    ("bench training --models d13 --out new", None, USAGE, r"unknown model: 'd13'"),
    (f"bench speedrun --recipe tiny --rows {MANY} --out new", None, USAGE, rf"tiny with --rows {MANY} needs at least"),
    ("bench speedrun --recipe tinny --out new", None, USAGE, r"did you mean 'tiny'"),
    (f"bench inference --model tiny --batches {MANY} --out new", None, USAGE, rf"a cache of {MANY} x 129 tokens needs at least .* GB"),
    ("bench inference --model tiny --batches 0 --out new", None, USAGE, r"batches=\(0,\) must be"),
    (f"bench inference --model tiny --prompt {MANY} --out new", None, USAGE, r"prompt=\d+ must leave room in tiny's context of 256"),
    ("bench inference --model d9 --out new", None, USAGE, r"unknown model: 'd9'"),
    ("bench inference --model tiny --out text.txt", None, CANNOT_CREATE, r"cannot write results to text\.txt"),
    ("bench peers", None, USAGE, r"no peer; name a checkout"),
    ("bench compare none.json b.json", None, NO_INPUT, r"no results at none\.json"),
    ("bench compare a.json a.json", text("a.json", "[]"), BAD_DATA, r"a\.json is not a file of results"),
]  # fmt: skip


def listing(folder: Path) -> dict[str, int]:
    """The sizes of all files but locks, which name the process that held them last."""
    files = (path for path in folder.rglob("*") if path.name != "run.lock")
    return {str(path.relative_to(folder)): path.lstat().st_size for path in files}


@pytest.mark.parametrize(("arguments", "build", "code", "pattern"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, build, code, pattern, made, tmp_path, monkeypatch, capsys
):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if build:
        build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    before = [listing(tmp_path), listing(made)]
    given = shlex.split(arguments)
    capsys.readouterr()
    found = main(given)
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert found == code and len(errors) == 1 and lines[-1] == errors[0], printed.err
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in printed.out + printed.err and "a bug" not in printed.err
    assert [listing(tmp_path), listing(made)] == before

"""Flags, TOML files and presets."""

import dataclasses
import json
from pathlib import Path

import pytest

from hotlap.common.options import as_typed, differences, flat, parse, to_json
from hotlap.model.config import GPT2Config
from hotlap.train import presets, pretrain, sft
from hotlap.train.config import DPOConfig, GPT2PretrainConfig
from hotlap.train.data import prepare
from hotlap.train.evaluation import command
from hotlap.train.rl_config import RLConfig
from hotlap.train.run import report
from hotlap.train.speedruns import demo, grade, minutes, track

CONFIGS = (
    pretrain.PretrainConfig, sft.SFTConfig, prepare.DataConfig, prepare.TokenizerConfig, command.EvalConfig,
    report.ReportConfig, track.TrackConfig, grade.GradeConfig,
    minutes.MinutesConfig, demo.TinyConfig,
)  # fmt: skip


def parse_pretrain(*arguments: str) -> pretrain.PretrainConfig:
    return parse(
        pretrain.PretrainConfig, list(arguments), command="pretrain",
        presets=presets.PRETRAIN, depth=presets.from_depth,
    )  # fmt: skip


def toml(tmp_path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
    path = toml(tmp_path, 'seed = 3\nbatch-rows = 8\ndata = "x.txt"\n[optim]\nmatrix_lr = 0.5\nhead_lr = 1\n')
    config = parse_pretrain("--preset", "tiny", "--config", path, "--optim.head-lr", "0.25", "--seed", "4")
    preset = presets.tiny()
    assert config == dataclasses.replace(
        preset, seed=4, batch_rows=8, data="x.txt",
        optim=dataclasses.replace(preset.optim, matrix_lr=0.5, head_lr=0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [presets.gpt2_124m(), presets.tiny_sft(), DPOConfig(), RLConfig(data=("gsm8k", "mbpp"), reward="a:b")],
    ids=lambda config: type(config).__name__,
)
def test_the_config_json_of_a_run_gives_its_configuration(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert parse(type(config), ["--config", str(path)], command="") == config
    changed = parse(type(config), ["--config", str(path), "--out", "new", "--loop.steps", "7"], command="")
    assert changed == dataclasses.replace(
        config, out=Path("new"), loop=dataclasses.replace(config.loop, steps=7)
    )


def test_the_config_json_of_a_gpt_2_gives_its_configuration(tmp_path):
    config = dataclasses.replace(GPT2PretrainConfig(), model=GPT2Config(layers=3), seed=5)
    (tmp_path / "config.json").write_text(to_json(config))
    assert parse_pretrain("--config", str(tmp_path / "config.json")) == config


def test_values_of_every_type_come_from_a_file(tmp_path):
    text = 'out = "a/b"\ndtype = "float32"\ntokenizer = "--=x y"\nmicro_batch = 8\nmodel.smear = false\n'
    text += "[schedule]\nmomentum = [0, 0.5, 0.25]\nstages = [[0.25, 0.5], [1, 1]]\nfinal_lr = 1e-30\n"
    config = parse_pretrain("--config", toml(tmp_path, text))
    assert config.out == Path("a/b") and config.dtype == "float32" and config.tokenizer == "--=x y"
    assert config.micro_batch == "8" and not config.model.smear and config.model.backout
    assert config.schedule.momentum == (0.0, 0.5, 0.25)
    assert config.schedule.stages == ((0.25, 0.5), (1.0, 1.0)) and config.schedule.final_lr == 1e-30
    out = toml(tmp_path, 'out = "scores.json"\ntasks = ["facts"]\n')
    config = parse(command.EvalConfig, ["--config", out], command="eval")
    assert config.out == Path("scores.json") and config.tasks == ("facts",)
    assert parse(command.EvalConfig, ["--config", toml(tmp_path, "tasks = []")], command="eval").tasks == ()
    beside = parse(
        command.EvalConfig, ["--config", toml(tmp_path, "\ufefftasks = []"), "--data", "./pydocs"], command=""
    )
    assert beside.tasks == () and beside.data == "./pydocs"  # not the built-in text
    grade_config = parse(grade.GradeConfig, ["--config", toml(tmp_path, "fp8 = true")], command="")
    assert grade_config.fp8 and not grade_config.yes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bach_rows = 3", r"unknown key in .*run\.toml: 'bach_rows'; did you mean 'batch_rows'\?"),
        ("[model]\nlayer = 3", r"'model\.layer'; did you mean 'model\.layers'\?"),
        ("zzz = 3", "known: out, batch_rows"),
        ("data.file = 3", "unknown key in .*: 'data.file'"),
        ("model = 3", r"model=3 is not a table; begin it with \[model\]"),
        ('batch_rows = "eight"', "batch_rows='eight': .*a whole number"),
        ("batch_rows = true", "batch_rows=True does not fit batch_rows"),
        ("batch_rows = false", "batch_rows=False does not fit batch_rows"),
        ("batch_rows = 1.5", "batch_rows=1.5: .*a whole number"),
        ("model.smear = 1", "model.smear=1 does not fit model.smear"),
        ("optim.matrix_lr = true", "optim.matrix_lr=True does not fit optim.matrix_lr"),
        ("out = true", "out=True does not fit out"),
        ('dtype = "float8"', "dtype='float8': .*float32"),
        ("compile = 1", "compile=1: .*auto"),
        ('schedule.momentum = ["a", 1, 1]', "momentum.*: .* numbers as"),
        ("schedule.momentum = 0.5", "momentum=0.5: .*3 values"),
        ("schedule.momentum = [0.5]", r"momentum=\[0.5\]: .*3 values"),
        ("seed = ", "is not TOML"),
        ('preset = "tiny"', "give the flag --preset=tiny"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(tmp_path, text, says):
    path = toml(tmp_path, text)
    with pytest.raises(ValueError, match=says) as caught:
        parse_pretrain("--config", path)
    assert path in str(caught.value)


def test_a_file_that_is_missing_and_a_preset_that_is_unknown_are_named():
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        parse_pretrain("--config", "none.toml")
    with pytest.raises(ValueError, match=r"unknown preset: 'tinny'; did you mean 'tiny'\?"):
        parse_pretrain("--preset", "tinny")
    with pytest.raises(ValueError, match="exclude each other"):
        parse_pretrain("--preset", "tiny", "--depth", "4")


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_help_lists_every_flag(kind, capsys):
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], command="it")
    said = capsys.readouterr().out
    names = [name.replace("_", "-") for name in flat(dataclasses.asdict(kind()))]
    assert all(f"--{name}" in said for name in (*names, "config", "debug"))


def test_differences_name_each_field_that_changed():
    saved = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": 0}
    assert differences(saved, {"a": 1, "b": {"c": 3, "d": [1]}, "new": 5}) == [
        "b.c: saved 2, current 3",
        "gone: saved 0, current None",
        "new: saved None, current 5",
    ]
    config = json.loads(to_json(presets.tiny()))
    assert differences(config, json.loads(to_json(presets.tiny()))) == []


@pytest.mark.parametrize(
    "given",
    [
        "--model.smear=false",
        "--model.smear false",
        "--model.no-smear=1",
        "--model.no_smear 1",
        "--model.smear=",
    ],
)
def test_a_switch_with_a_value_is_refused_with_the_two_that_there_are(given):
    with pytest.raises(ValueError) as caught:
        parse_pretrain(*given.split())
    assert str(caught.value).startswith(f"{given}: ") and "--model.no-smear turns it off" in str(caught.value)


def test_a_value_is_shown_as_it_was_typed():
    for arguments in (["--optim.matrix-lr", "1e0"], ["--optim.matrix-lr=1e0"]):
        config = parse_pretrain(*arguments)
        assert as_typed("matrix_lr=1.0 is high", config, arguments) == "--optim.matrix-lr 1e0 is high"
    arguments = ["--model.window-pattern", "SX"]
    message = as_typed("window_pattern='SX' is wrong", parse_pretrain(*arguments), arguments)
    assert message == "--model.window-pattern SX is wrong"
    with pytest.raises(ValueError, match=r"^--depth 100000 must be"):
        parse_pretrain("--depth", "100000")
    arguments = ["--schedule.momentum", "1", "0", "0"]
    config = parse_pretrain(*arguments)
    message = as_typed("momentum=(1.0, 0.0, 0.0) is wrong", config, arguments)
    assert message == "--schedule.momentum (1.0, 0.0, 0.0) is wrong"

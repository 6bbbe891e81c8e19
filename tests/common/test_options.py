"""Flags, TOML files and presets."""

import dataclasses
import json
from pathlib import Path

import pytest

from hotlap.chat import ChatConfig
from hotlap.common.options import differences, parse, to_json
from hotlap.train import presets, pretrain, sft
from hotlap.train.data import prepare
from hotlap.train.evaluation import command
from hotlap.train.run import report
from hotlap.train.speedruns import demo, grade, minutes, track

CONFIGS = (
    pretrain.PretrainConfig, sft.SFTConfig, prepare.DataConfig, prepare.TokenizerConfig, command.EvalConfig,
    report.ReportConfig, track.TrackConfig, grade.GradeConfig,
    minutes.MinutesConfig, demo.TinyConfig, ChatConfig,
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


def test_paths_tuples_and_choices_come_from_a_file(tmp_path):
    path = toml(tmp_path, 'out = "a/b"\ndtype = "float32"\nschedule.momentum = [0, 0.5, 0.25]\n')
    config = parse_pretrain("--config", path)
    assert config.out == Path("a/b") and config.dtype == "float32"
    assert config.schedule.momentum == (0.0, 0.5, 0.25)
    out = toml(tmp_path, 'out = "scores.json"\ntasks = ["facts"]\n')
    config = parse(command.EvalConfig, ["--config", out], command="eval")
    assert config.out == Path("scores.json") and config.tasks == ("facts",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bach_rows = 3", r"unknown key in .*run\.toml: 'bach_rows'; did you mean 'batch_rows'\?"),
        ("[model]\nlayer = 3", r"'layer'; did you mean 'layers'\?"),
        ("zzz = 3", "known: out, data"),
        ('batch_rows = "8"', "batch_rows='8' must be int"),
        ("batch_rows = true", "batch_rows=True must be int"),
        ("batch_rows = 1.5", "batch_rows=1.5 must be int"),
        ("optim.matrix_lr = true", "matrix_lr=True must be float"),
        ("out = 3", "out=3 must be a path"),
        ("model = 3", "model must be a table"),
        ('dtype = "float8"', "'float8'; did you mean 'float32'"),
        ("compile = 1", "unknown compile in .*: 1"),
        ('schedule.momentum = ["a", 1, 1]', "momentum='a' must be float"),
        ("schedule.momentum = 0.5", "must be a list"),
        ("schedule.momentum = [0.5]", "must be a list"),
        ("seed = ", "is not TOML"),
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


def leaves(kind: object) -> int:
    """Number of flags that a dataclass makes."""
    nested = [getattr(kind, f.name) for f in dataclasses.fields(kind)]
    return sum(leaves(value) if dataclasses.is_dataclass(value) else 1 for value in nested)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_command_has_at_most_40_flags(kind):
    assert 1 <= leaves(kind()) <= 40


def test_differences_name_each_field_that_changed():
    saved = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": 0}
    assert differences(saved, {"a": 1, "b": {"c": 3, "d": [1]}, "new": 5}) == [
        "b.c: saved 2, current 3",
        "gone: saved 0, current None",
        "new: saved None, current 5",
    ]
    config = json.loads(to_json(presets.tiny()))
    assert differences(config, json.loads(to_json(presets.tiny()))) == []

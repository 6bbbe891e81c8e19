"""Recipes over a ladder of sizes: what is trained once, what is refused, and what is said of the result."""

import dataclasses
import json

import pytest

from hotlap.cli import main
from hotlap.train.studies import compare, series, sweep
from hotlap.train.studies.compare import CompareConfig, plan
from hotlap.train.studies.compare_report import Trained, comparison, verdict
from hotlap.train.studies.scaling import cost

pytest.importorskip("scipy")

SMALL = (
    "data='text.txt' tokenizer='characters' dtype='float32' batch_rows=4 loop.steps=4 model.layers=2 "
    "model.width=64 model.heads=2 model.kv_heads=2 model.context=32 model.vocab_size=64"
)
FLAGS = ["--base", SMALL, "--depths", "3", "1", "2", "--out", "series"]
SAME, SLOWER = "model.qk_gain=1.201", "optim.matrix_lr=0.002"


def test_the_command_trains_times_writes_and_keeps_no_checkpoints(work, capsys, monkeypatch):
    done, real = [], series.pretrain
    monkeypatch.setattr(series, "pretrain", lambda config: done.append(config.out.name) or real(config))
    monkeypatch.setattr(sweep, "TURNS", 1)
    assert main(["compare", "", SAME, *FLAGS, "--seeds", "1"]) == 0
    assert done == [f"d{depth}-{name}-0" for depth in (1, 2, 3) for name in ("base", SAME)]
    said = capsys.readouterr().out
    content = json.loads((work / "series/compare.json").read_text())
    assert content["comparisons"][0]["verdict"] in said and "| 3 | base | 1 |" in said
    assert content["date"] and content["device"] and len(content["runs"]) == 6
    assert (work / "series/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "![compare](compare.png)" in (work / "series/compare.md").read_text()
    assert not list((work / "series").rglob("step-*"))

    def diverge(config):
        done.append(config.out.name)
        raise FloatingPointError("the loss is nan")

    assert content["laws"]["base"]["flops"]["exponent"] > 0
    done.clear()
    monkeypatch.setattr(sweep, "pretrain", lambda config: pytest.fail("timed again"))
    assert main(["compare", "", SAME, *FLAGS, "--seeds", "1"]) == 0 and not done
    monkeypatch.setattr(series, "pretrain", diverge)
    monkeypatch.setattr(compare, "seconds_per_step", lambda variants, *given: dict.fromkeys(variants, 0.1))
    assert main(["compare", "", SAME, SLOWER, *FLAGS, "--seeds", "2"]) == 0
    first = [f"d{depth}-{SLOWER}-0" for depth in (1, 2, 3)]
    assert done == first + [f"d{d}-{name}-1" for d in (1, 2, 3) for name in ("base", SAME, SLOWER)]
    again = json.loads((work / "series/compare.json").read_text())["comparisons"]
    assert [(c["pairs"], c["diverged"]) for c in again] == [(3, 3), (0, 6)]
    assert main(["compare", "", SAME, *FLAGS, "--ratio", "0.01", "--seeds", "1"]) == 2
    assert "started with another configuration" in capsys.readouterr().err


def test_a_change_of_size_has_its_own_flops_and_length(work):
    config = CompareConfig(
        a="", b=("model.width=128 model.heads=4 model.kv_heads=4",), base=SMALL, depths=(1, 2, 4)
    )
    for narrow, wide in (runs.values() for runs in plan(config).values()):
        assert wide.model.layers == narrow.model.layers and wide.model.width == 2 * narrow.model.width
        assert cost(wide)[0] > 5 * cost(narrow)[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to compare; give A and B"),
        ([SAME], "nothing to compare; give A and B"),
        (["", ""], "'' is there twice"),
        (["", SAME, f"{SAME} "], f"'{SAME}' is there twice"),
        (["", "model.smear=true"], "'model.smear=true' trains the same as 'base'"),
        (["", "seed=1"], "'seed=1' trains the same as 'base'"),
        (["model.smaer=false", ""], "did you mean 'model.smear'?"),
        (["", "model.smear"], "not a string of TOML"),
        (["", "data='other.txt'"], "changes data or tokenizer"),
        (["", "model.vocab_size=128"], "changes data or tokenizer"),
        (["", "validation_tokens=100"], "validates on other text"),
        (["", "loop.steps=9"], "'loop.steps=9' sets the length of a run"),
        (["", "loop.minutes=1.0"], "'loop.minutes=1.0' sets the length of a run"),
        (["", "base='model'"], "starts from model, which has one size"),
        (["", SAME, "--preset", "gpt2-classic", "--base", ""], "is a GPT-2"),
        (["", SAME, "--preset", "tinny"], "did you mean 'tiny'?"),
        (["", SAME, "--depths", "1", "2"], "must be at least 3 different depths"),
        (["", SAME, "--depths", "1", "2", "2"], "must be at least 3 different depths"),
        (["", SAME, "--depths", "0", "1", "2"], "depth=0 must be from 1"),
        (["", SAME, "--depths", "1", "2", "900"], "training"),
        (["", SAME, "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["", SAME, "--ratio", "1e-9"], "gives 0 steps with 1 layers"),
        (["", SAME, "--ratio", "nan"], "--ratio nan must be 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    work, capsys, monkeypatch, arguments, said
):
    monkeypatch.setattr(series, "prepare", lambda *given: pytest.fail("not refused"))
    assert main(["compare", *FLAGS, *arguments]) == 2
    assert said in capsys.readouterr().err and not (work / "series").exists()


def test_too_little_text_and_another_vocabulary_are_refused_before_anything_is_trained(
    work, capsys, monkeypatch
):
    monkeypatch.setattr(series, "pretrain", lambda config: pytest.fail("trained"))
    monkeypatch.setattr(sweep, "pretrain", lambda config: pytest.fail("timed"))
    assert main(["compare", "", SAME, *FLAGS, "--ratio", "1"]) == 2
    assert "more than 4 teach less and less" in capsys.readouterr().err
    other = SMALL.replace("vocab_size=64", "vocab_size=512")
    assert main(["compare", "", SAME, *FLAGS[2:-1], "other", "--base", other]) == 2
    assert "give --base model.vocab_size=64 and another --out" in capsys.readouterr().err


def runs(recipe: str, factor: float, diverged: tuple[int, ...] = (), noise: float = 0.0) -> list[Trained]:
    """At four depths and two seeds, with losses `factor` times those of a law."""
    return [
        Trained(
            recipe, depth, seed,
            None if seed == 0 and depth in diverged
            else factor * (1 + noise * (-1) ** (depth + seed)) * 2 * depth**-0.2,
            1e12 * depth**2, 1e6 * depth, 10 * depth**2,
        )
        for depth in (1, 2, 3, 4) for seed in (0, 1)
    ]  # fmt: skip


def said(b: list[Trained]) -> str:
    return verdict(comparison([*runs("A", 1), *b], "A", "B"), "A")


def test_the_verdict_is_one_line():
    better = said(runs("B", 0.98))
    assert (
        better
        == "B needs 0.817 (0.817 to 0.817) times the compute of A, and 0.817 (0.817 to 0.817) times its time."
    )
    assert said(runs("B", 1, noise=0.001)).startswith(
        "B: no difference to A found; 0.990 to 1.010 times its compute"
    )
    assert "no multiplier, as 2 depths have runs of both" in said(runs("B", 0.98)[:4])


def test_a_run_that_diverged_is_left_out_and_said():
    found = comparison([*runs("A", 1), *runs("B", 0.98, diverged=(2, 3))], "A", "B")
    assert (found.pairs, found.diverged) == (6, 2) and found.compute.overall.value == pytest.approx(
        0.817, abs=1e-3
    )
    assert verdict(found, "A").endswith("; without 2 of 8 pairs, where a run diverged.")
    nothing = [dataclasses.replace(run, bpb=None) for run in runs("B", 1)]
    assert "no multiplier, as 0 depths have runs of both" in said(nothing)

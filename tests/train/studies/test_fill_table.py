"""`hotlap sweep --fill-table`: from the device's speed to a row that `hotlap speedrun minutes` takes."""

import dataclasses
import json
import math

import pytest
import torch
from helpers.small_runs import MODEL
from helpers.tools import tiny_config

from hotlap.cli import main
from hotlap.common.errors import Interrupted
from hotlap.train.run.folder import write_machine
from hotlap.train.speedruns.shapes import best_shape, corpus_bytes, own_table, read_table
from hotlap.train.studies import fill_table

COMMAND = ["sweep", "--fill-table", "--seconds", "10", "--seeds", "2", "--data", "text.txt", "--out", "fill"]


@pytest.fixture
def folder(work, monkeypatch):
    """A folder to work in, with a table of its own, on a device of 1 TFLOP/s."""
    monkeypatch.setenv("XDG_STATE_HOME", str(work / "state"))
    monkeypatch.setattr(fill_table, "trial_flops", lambda world, dtype: 1e12)
    return work


@pytest.fixture
def landscape(folder, monkeypatch) -> list:
    """In place of training: 3 layers and a vocabulary of 2,048 are best, and 4 layers do not fit. Returns the
    runs that were trained.
    """
    runs = []

    def outcome(run, variant, world):
        run.out.mkdir(exist_ok=True)
        runs.append(run)
        write_machine(run.out, torch.device("cpu"), 1)
        model, best = run.model, (3, 2048)
        away = sum(math.log2(a / b) ** 2 for a, b in zip((model.layers, model.vocab_size), best, strict=True))
        return {"bpb": None if model.layers > 3 else 1.5 + 0.05 * away + 0.001 * run.seed}

    monkeypatch.setattr(fill_table.sweep, "outcome", outcome)
    monkeypatch.setattr(
        fill_table.sweep, "seconds_per_step", lambda variants, *more: dict.fromkeys(variants, 0.5)
    )
    return runs


def test_the_row_has_the_best_with_all_that_was_tried_and_is_chosen_afterwards(folder, landscape, capsys):
    assert main([*COMMAND, "--yes"]) == 0
    (row,) = read_table(own_table())
    assert (row.shape.depth, row.shape.vocab_size) == (3, 2048) and row.bpb == pytest.approx(1.5005)
    assert (row.flops, row.seeds, row.seconds, row.data) == (1e13, 2, 10, "text.txt")
    assert row.corpus_bytes == corpus_bytes("text.txt") and 0 < row.corpus_tokens < row.corpus_bytes
    tried = {tuple(one["shape"].values()): one["bpb"] for one in row.tried}
    assert tried[dataclasses.astuple(row.shape)] == pytest.approx([1.5, 1.501]) and len(tried) >= 9
    assert [None, None] in tried.values(), "4 layers diverged"
    assert read_table(folder / "fill/shapes.json") == [row]
    assert best_shape(1.1e13, corpus_bytes("text.txt"), read_table(own_table()))[0] == row.shape
    out = capsys.readouterr().out
    assert "about 3.0 minutes of training for the first 9 shapes" in out and str(own_table()) in out
    assert "**1.5005**" in out and "not possible" in out


def test_runs_have_the_length_of_minutes_with_the_same_seeds_for_all(folder, landscape):
    assert main([*COMMAND, "--yes"]) == 0
    assert {run.seed for run in landscape} == {0, 1} and not any(run.loop.minutes for run in landscape)
    for run in landscape:
        read = run.loop.steps * run.batch_rows * run.model.context
        assert run.loop.steps <= 20, "10 s, of half a second a step"
        assert read < 9 * corpus_bytes("text.txt"), "the corpus ends it after eight passes"


def test_nobody_is_made_to_wait_without_being_asked(folder, landscape, monkeypatch, capsys):
    assert main(COMMAND) == 2 and "give --yes to start" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(COMMAND) == 0
    assert not landscape and not (folder / "fill").exists() and not own_table().exists()


def test_it_goes_on_where_it_began_even_if_another_speed_is_measured(folder, landscape, monkeypatch):
    real = fill_table.sweep.outcome

    def stops(run, variant, world):
        if len(landscape) == 5:
            raise Interrupted("stopped")
        return real(run, variant, world)

    monkeypatch.setattr(fill_table.sweep, "outcome", stops)
    assert main([*COMMAND, "--yes"]) == 130 and not own_table().exists()
    monkeypatch.setattr(fill_table.sweep, "outcome", real)
    monkeypatch.setattr(fill_table, "trial_flops", lambda world, dtype: pytest.fail("measured again"))
    before = landscape[0].model
    landscape.clear()
    assert main([*COMMAND, "--yes"]) == 0
    assert landscape[0].model == before and read_table(own_table())[0].flops == 1e13


def test_a_folder_of_another_search_or_sweep_is_refused(folder, landscape, capsys):
    assert main([*COMMAND, "--yes"]) == 0
    capsys.readouterr()
    assert main([*COMMAND, "--yes", "--seconds", "20"]) == 2
    assert "'seconds': 10.0}, not" in capsys.readouterr().err
    assert main(["sweep", "--out", "fill", "--variants", "model.smear=false", "--base", "loop.steps=1"]) == 2
    assert "was started with" in capsys.readouterr().err
    (folder / "other").mkdir()
    (folder / "other/notes.txt").touch()
    assert main([*COMMAND, "--yes", "--out", "other"]) == 73
    assert "other holds notes.txt" in capsys.readouterr().err


def test_a_time_that_is_too_short_is_said_and_writes_no_row(folder, landscape, capsys):
    assert main([*COMMAND, "--yes", "--seconds", "0.4"]) == 2
    assert "no shape could be trained in 0.4 s" in capsys.readouterr().err and not own_table().exists()


def test_shards_keep_their_vocabulary(folder, landscape):
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "280"]) == 0
    assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
    assert main([*COMMAND, "--yes", "--data", "shards"]) == 0
    (row,) = read_table(own_table())
    assert len({one["shape"]["vocab_size"] for one in row.tried}) == 1 and row.shape.depth == 3


def test_it_trains(folder, monkeypatch):
    """The real runs, with models of one layer and along one axis."""
    real = fill_table.timed

    def small(out, data, minutes, shape, repeats):
        model = tiny_config(**MODEL, vocab_size=300)
        recipe = real(out, data, minutes, shape, repeats)
        return dataclasses.replace(recipe, model=model, batch_rows=shape.step_tokens // 1024, compile="off")

    monkeypatch.setattr(fill_table, "timed", small)
    monkeypatch.setattr(fill_table, "AXIS_WORDS", {"step_tokens": "batch"})
    monkeypatch.setattr(fill_table.sweep, "TURNS", 1)
    monkeypatch.setattr(fill_table, "steps_in", lambda *given: 2)
    assert main([*COMMAND, "--yes"]) == 0
    (row,) = read_table(own_table())
    assert len(row.tried) >= 2 and 0 < row.bpb < 9 and row.device and row.date and row.commit
    (steps,) = (folder / "fill").glob("vocabulary-*/steps.json")
    times = json.loads(steps.read_text(encoding="utf-8"))
    assert set(times) >= {"base"} and not list((folder / "fill").rglob("step-*"))

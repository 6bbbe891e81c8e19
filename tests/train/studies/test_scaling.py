"""Laws that a series of runs shows, and what a budget buys by them."""

import dataclasses
import json

import numpy as np
import pytest

from hotlap.cli import main
from hotlap.train.studies import scaling
from hotlap.train.studies.laws import fit_law
from hotlap.train.studies.scaling import (
    AXES,
    Point,
    ScalingConfig,
    budget_lines,
    check,
    cost,
    deepest,
    depth_run,
    draw,
)

SMALL = ScalingConfig(depths=(1, 2, 3), ratio=1, vocab_size=512, context=64)


def test_a_power_law_is_found_with_its_error():
    x = np.geomspace(1e15, 1e18, 5)
    law = fit_law(x, 50 * x**-0.1)
    assert (law.factor, law.exponent) == (pytest.approx(50), pytest.approx(0.1))
    assert law.floor == 0 and law.floors is None and law.exponent_error < 1e-6 and law.residual < 1e-6
    assert law.at(1e20) == pytest.approx(0.5, rel=1e-6)
    noisy = fit_law(x, 50 * x**-0.1 * np.array([1.01, 0.99, 1.0, 0.99, 1.01]))
    assert abs(noisy.exponent - 0.1) < 3 * noisy.exponent_error


def test_a_floor_is_fitted_only_with_runs_enough_and_says_how_sure_it_is():
    x = np.geomspace(1e15, 1e20, 8)
    y = 0.6 + 50 * x**-0.12
    law = fit_law(x, y)
    assert law.floor == pytest.approx(0.6, abs=0.01) and law.exponent == pytest.approx(0.12, abs=0.005)
    assert law.floors[0] <= 0.61 and law.floors[1] >= 0.59
    assert fit_law(x[:5], y[:5]).floor == 0
    wild = fit_law(x, y * np.array([1.02, 0.98, 1.01, 0.99, 1.02, 0.98, 1.01, 0.99]))
    assert wild.floors[1] - wild.floors[0] > 5 * (law.floors[1] - law.floors[0])


def point(depth: int, bpb: float, speed: float | None = 1e6) -> Point:
    flops, tokens = cost(depth_run(SMALL, depth))
    return Point(f"d{depth}", flops, flops / tokens / 6, tokens, bpb, speed)


def test_a_budget_pays_for_the_depth_and_not_for_the_next():
    exact = cost(depth_run(SMALL, 4))[0]
    assert deepest(SMALL, exact) == 4 and deepest(SMALL, 0.999 * exact) == 3 and deepest(SMALL, 1.0) is None


def test_hours_and_dollars_become_flops_at_the_speed_of_the_largest_run():
    points = [point(3, 2.0, speed=5e5), point(4, 1.7), point(5, 1.5)]
    law = fit_law([p.flops for p in points], [p.bpb for p in points])
    flops = cost(depth_run(SMALL, 6))[0]
    hours = 1.001 * flops / points[2].flops_per_second / 3600
    config = dataclasses.replace(
        SMALL, budget_flops=1.001 * flops, budget_hours=hours, budget_dollars=3 * hours
    )
    by_flops, by_hours, by_dollars, assumed = budget_lines(config, points, law, (3.0, "a shop"))
    assert all(": depth 6, " in line for line in (by_flops, by_hours, by_dollars))
    assert "$3 an hour (a shop)" in by_dollars and "TFLOP/s of d5" in assumed
    assert f"about {law.at(flops):.4f} bits per byte" in by_flops
    twice = dataclasses.replace(config, dollars_per_hour=1e6)
    assert "too little for the smallest" in budget_lines(twice, points, law, (3.0, "a shop"))[2]


def test_what_is_far_beyond_the_series_is_not_predicted(tmp_path):
    points = [point(1, 2.0), point(2, 1.7), point(3, 1.5)]
    law = fit_law([p.flops for p in points], [p.bpb for p in points])
    config = dataclasses.replace(SMALL, budget_flops=100 * points[2].flops)
    far = budget_lines(config, points, law, None)[0]
    assert "would be a guess" in far and "about" not in far
    near = dataclasses.replace(SMALL, budget_flops=2 * points[2].flops)
    assert "bits per byte" in budget_lines(near, points, law, None)[0]
    assert "a guess" not in budget_lines(near, points, law, None)[0]
    pytest.importorskip("matplotlib")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "caption", lambda figure, *facts: drawn.append(figure))
        others = [point(20, 1.0)]
        laws = {axis: fit_law([getattr(p, axis) for p in points], [p.bpb for p in points]) for axis in AXES}
        draw(points, laws, others, tmp_path / "scaling.png", "a machine", "a day")
    assert [axes.get_xlabel() for axes in drawn[0].axes] == list(AXES.values())
    for axes, axis in zip(drawn[0].axes, AXES, strict=True):
        ends = [max(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 3]
        assert max(ends) <= 10.001 * max(getattr(p, axis) for p in points)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"depths": (12,)}, "at least 3 different"),
        ({"depths": (1, 2)}, "a law fits any two"),
        ({"depths": (1, 1, 2)}, "at least 3 different"),
        ({"depths": (1, 2, 2**40)}, "depth"),
        ({"budget_flops": 10.0}, "budget_flops=10 is too little for one step"),
        ({"ratio": 1e-9}, "steps"),
        ({"budget_dollars": 5.0}, "--dollars-per-hour"),
        ({"budget_hours": -1.0}, "budget_hours=-1.0 must be 0 .none. or more"),
        ({"depths": (0, 1, 2)}, "depth=0"),
    ],
)
def test_a_series_that_cannot_work_is_refused_at_once(fields, said):
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(SMALL, **fields), None)


def test_the_command_trains_a_series_once_and_draws_it(work, capsys, monkeypatch):
    def small(depth, vocab_size, context, ratio):
        run = real(depth, vocab_size, context, ratio)
        shape = dataclasses.replace(run.model, layers=depth, width=32, heads=1, kv_heads=1)
        loop = dataclasses.replace(run.loop, steps=3 * depth)
        return dataclasses.replace(run, model=shape, batch_rows=4, loop=loop, dtype="float32")

    real = scaling.from_depth
    monkeypatch.setattr(scaling, "from_depth", small)
    flags = ["scaling", "--depths", "2", "1", "3", "--context", "32", "--data", "text.txt"]
    flags += ["--tokenizer", "characters", "--micro-batch", "all", "--out", "series"]
    assert main([*flags[:-1], "other"]) == 2
    assert "vocab_size=32768, but the tokenizer has 64 ids" in capsys.readouterr().err
    flags += ["--vocab-size", "64"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert out.index("| d1 |") < out.index("| d2 |") and "exponent" in out and "No floor" in out
    content = json.loads((work / "series" / "scaling.json").read_text())
    assert [p["tokens"] for p in content["points"]] == [384, 768, 1152]
    assert any("nanochat" in p["name"] for p in content["peers"])
    assert (work / "series" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("hotlap.train.studies.series.pretrain", lambda config: pytest.fail("trained again"))
    assert main([*flags, "--budget-flops", "1e30"]) == 0
    assert f"depth {scaling.DEEPEST}" in capsys.readouterr().out

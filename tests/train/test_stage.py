"""New stages need no change to the loop."""

import pytest
from helpers.ranks import run_ranks
from helpers.toy_stages import train_toy


@pytest.mark.parametrize(("stage", "metric"), [("preference", "margin"), ("policy", "advantage")])
def test_a_new_stage_takes_the_same_steps_on_any_number_of_ranks(stage, metric, tmp_path):
    runs = [run_ranks(size, train_toy, stage, str(tmp_path), f"on-{size}")[0] for size in (1, 2)]
    for name in ("loss", metric, "gradient_norm"):
        one, two = ([line[name] for line in run] for run in runs)
        assert len(one) == 5 and len(set(one)) == 5
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5), name
    report = (tmp_path / "on-2" / "report.md").read_text()
    assert ("validation reward | 0.5" in report) == (stage == "policy")

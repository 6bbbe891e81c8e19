"""Where the time of a step goes: each kernel is of one kind, and no time is lost."""

import json

from hotlap.bench.breakdown import BreakdownConfig, break_down, by_kind


def test_every_kernel_is_of_one_kind_and_the_most_time_comes_first():
    found = {
        "_linear_relu2_tma_kernel": (3.0, 2),
        "_relu2_forward_kernel": (0.5, 1),
        "_attention_dq_hopper_kernel": (2.0, 1),
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": (9.0, 4),
        "nvjet_sm90_hsh_192x192_64x3_2x1_v_bz_coopB_NNN": (1.0, 1),
        "triton_poi_fused_add_0": (0.25, 1),
        "a kernel that nobody knows": (0.125, 1),
    }
    kinds = by_kind(found)
    assert kinds[:3] == [("matmul", 10.0), ("our linear + ReLU^2", 3.0), ("our attention", 2.0)]
    assert dict(kinds)["other"] == 0.125
    assert sum(ms for _, ms in kinds) == sum(ms for ms, _ in found.values())


def test_a_step_is_profiled_and_its_trace_kept(tmp_path):
    rows = break_down(BreakdownConfig("tiny", rows=1, steps=1, out=tmp_path))
    times = {row["provider"]: row["ms"] for row in rows}
    assert 0 < times["matmul"] < times["whole step, profiled"]
    assert json.loads((tmp_path / "breakdown.json").read_text())["rows"] == rows
    assert "aten::mm" in (tmp_path / "breakdown.txt").read_text()
    assert (tmp_path / "trace.json.gz").stat().st_size > 0

"""The interpreter hides what compilers see of a kernel on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_compilers_see_one_graph_and_which_arguments_a_kernel_changes():
    """An argument that is taken to be changed, and is not, costs a copy; the other way round, the result."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("traced_kernels.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["changed"] == {
        "_attention_forward_kernel": ["lse", "y"],
        "_attention_dq_kernel": ["delta", "dq"],
        "_attention_dk_dv_kernel": ["dk", "dv"],
        "_decode_split_kernel": ["k_cache", "lse", "v_cache", "y"],
        "_decode_combine_kernel": ["y"],
        "_decode_linear_kernel": ["gates", "total", "y"],
        "_muon_momentum_kernel": ["momentum", "update"],
        "_muon_squares_kernel": ["squares"],
        "_muon_factors_kernel": ["factors", "second"],
        "_muon_apply_kernel": ["weight"],
        "_symmetric_kernel": ["out"],
        "_symmetric_tma_kernel": ["out"],
        "_largest_kernel": ["largest"],
        "_quantize_kernel": ["inverse", "y"],
        "_transpose_kernel": ["transposed"],
        "_linear_relu2_kernel": ["out"],
        "_linear_relu2_tma_kernel": ["out"],
        "_linear_relu2_apart_kernel": ["out"],
        "_qkv_forward_kernel": ["k", "q", "rstd", "v"],
        "_qkv_backward_kernel": ["de", "dgate", "dqkv"],
        "_rms_norm_forward_kernel": ["rstd", "total", "y"],
        "_rms_norm_backward_kernel": ["dresidual", "dscales", "dx"],
        "_embedding_forward_kernel": ["y"],
        "_embedding_backward_kernel": ["grad"],
        "_cross_entropy_forward_kernel": ["losses", "lse"],
        "_cross_entropy_backward_kernel": ["dlogits"],
    }
    assert found["operations"] == ["hotlap.linear_cross_entropy_sum.default"]  # which is not looked into

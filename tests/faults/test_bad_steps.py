"""Bad steps, and ranks that fail, hang or lag."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.ranks import Failed, run_ranks
from helpers.run_functions import command, losses, metrics, pretraining, state_of
from helpers.small_runs import MODEL_FLAGS, write_text

from hotlap.model.weights import run_checkpoints

RESUMED = partial(pretraining, resume="auto")


def last_lines(failure: Failed) -> dict[int, str]:
    return {rank: text.rstrip().splitlines()[-1] for rank, text in failure.texts.items()}


@pytest.mark.parametrize(
    "point, what", [("loss", "loss nan on batch"), ("gradient", "a gradient that is not finite")]
)
def test_a_nan_stops_all_ranks_before_the_update(tmp_path, point, what):
    with pytest.raises(Failed) as failure:
        run_ranks(2, pretraining, str(tmp_path), "run", env={"FAULT": f"{point}:1:5:nan"})
    for line in last_lines(failure.value).values():
        assert re.search(rf"FloatingPointError: .* at step 5: .*rank 1 has {what}", line)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(5))
    run_ranks(2, RESUMED, str(tmp_path), "run")
    run_ranks(2, pretraining, str(tmp_path), "reference")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "reference")


def test_a_bad_step_is_skipped_on_all_ranks_if_requested(tmp_path):
    skipping = partial(pretraining, loop={"bad_steps": "skip"})
    run_ranks(2, skipping, str(tmp_path), "run", env={"FAULT": "loss:1:5:nan"})
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0] * 5 + [1] * 5
    assert lines[5]["loss"] is None and all(line["loss"] > 0 for line in lines[:5] + lines[6:])


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_loss_recovers_after_a_gradient_spike(tmp_path, policy):
    run = partial(pretraining, steps=60, loop={"bad_steps": policy, "clip": 1.0})
    run_ranks(2, run, str(tmp_path), "run", env={"FAULT": "gradient:0:40:grow,gradient:1:40:grow"})
    run_ranks(2, run, str(tmp_path), "reference")
    ours, reference = metrics(tmp_path / "run"), metrics(tmp_path / "reference")
    assert ours[40]["gradient_norm"] > 100 * ours[39]["gradient_norm"]
    assert ours[-1]["skipped"] == (policy == "skip")
    assert ours[50]["loss"] < reference[50]["loss"] * 1.1


def test_a_killed_rank_ends_the_others_within_seconds_and_is_named(tmp_path):
    with pytest.raises(Failed) as failure:
        run_ranks(3, pretraining, str(tmp_path), "run", env={"FAULT": "loss:1:3:sigkill"})
    lines = last_lines(failure.value)
    assert lines[1] == "killed by signal 9"
    assert all("RankLost: rank 1 does not answer" in lines[rank] for rank in (0, 2))


def test_a_rank_that_hangs_is_named_and_the_others_dump_their_stacks(tmp_path):
    with pytest.raises(Failed) as failure:
        run_ranks(
            3,
            partial(pretraining, timeout=4),
            str(tmp_path),
            "run",
            env={"FAULT": "step:2:3:sigstop", "STDERR": str(tmp_path / "said")},
        )
    lines = last_lines(failure.value)
    assert all("RankLost: rank 2 does not answer" in lines[rank] for rank in (0, 1))
    said = (tmp_path / "said").read_text()
    assert "take_step" in said or "total" in said  # both waiting ranks write at once


def test_other_ranks_report_the_error_of_a_failed_rank(tmp_path):
    with pytest.raises(Failed) as failure:
        run_ranks(3, pretraining, str(tmp_path), "run", env={"FAULT": "loss:1:3:raise"})
    lines = last_lines(failure.value)
    assert lines[1] == "ValueError: injected at loss, step 3"
    assert all("RankLost: rank 1: injected at loss, step 3" in lines[rank] for rank in (0, 2))


def test_a_straggler_is_named_with_its_delay(tmp_path):
    slow = ",".join(f"step:1:{step}:sleep=0.02" for step in range(50))
    said = run_ranks(3, partial(pretraining, steps=51), str(tmp_path), "run", env={"FAULT": slow})
    assert any(
        re.search(r"rank 1 is a straggler: it starts each step after 0\.0\d+ s, .* \(\d+\.\d times\)", line)
        for line in said[0]
    )
    assert len(metrics(tmp_path / "run")) == 51


def test_a_copy_that_differs_on_one_rank_is_found_before_it_is_saved(tmp_path):
    with pytest.raises(Failed) as failure:
        run_ranks(2, pretraining, str(tmp_path), "run", env={"FAULT": "copies:1:7:flip"})
    assert all("differs between ranks at step 7" in line for line in last_lines(failure.value).values())
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == ["step-000004"]


COMMAND = [
    "pretrain", "--data", "text.txt", "--tokenizer", "characters", *MODEL_FLAGS, "--batch-rows", "12",
    "--dtype", "float32", "--compile", "off", "--loop.save-every", "4", "--out", "run", "--resume", "auto",
]  # fmt: skip


def torchrun(folder: Path, *flags: str, env: dict | None = None, restarts: int = 0) -> subprocess.Popen:
    """Start a pretraining on two ranks in folder/run, as a user would."""
    write_text(folder / "text.txt")
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", str(restarts), "-m", "hotlap.cli", *COMMAND, *flags,
        ],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_torchrun_restarts_killed_ranks_and_they_resume(tmp_path):
    process = torchrun(tmp_path, "--loop.steps", "10", env={"FAULT": "loss:1:6:sigkill"}, restarts=1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    (tmp_path / "whole").mkdir()
    write_text(tmp_path / "whole" / "text.txt")
    run_ranks(2, command, str(tmp_path / "whole"), *COMMAND, "--loop.steps", "10")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole" / "run")


def test_sigterm_to_torchrun_saves_and_stops_all_ranks(tmp_path):
    process = torchrun(tmp_path, "--loop.steps", "100000", "--loop.save-every", "100000")
    path, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < end and not (path.exists() and path.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    (saved,) = run_checkpoints(tmp_path / "run")
    step = json.loads((saved / "state.json").read_text())["last"]["step"] + 1
    assert f"stopped after step {step} of 100000" in said
    assert len(metrics(tmp_path / "run")) == step and saved.name == f"step-{step:06d}"

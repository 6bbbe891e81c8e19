"""A full disk is reported, before saving if possible, and the previous checkpoint stays intact."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PRIVATE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
]  # mounts that nobody else sees, without being root


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict:
    """The report of `fill_a_disk.py`, run on its own disk of 4 MB."""
    disk = tmp_path_factory.mktemp("disk")
    script = (
        f"mount -t tmpfs -o size=4m disk {disk} && exec {sys.executable} {HERE / 'fill_a_disk.py'} {disk}"
    )
    if not shutil.which("unshare") or subprocess.run([*PRIVATE, "true"], capture_output=True).returncode:
        pytest.skip("unshare may not mount a disk here")
    done = subprocess.run([*PRIVATE, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_has_numbers(text: str, path: str) -> None:
    """The text names the path, the bytes needed and the bytes free."""
    needed, free = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) bytes, and ([\d,]+) are", text).groups()
    )
    assert path in text and needed > 1 << 20 and free < needed


def test_a_checkpoint_that_does_not_fit_is_not_started(said):
    assert_has_numbers(said["before"], "/checkpoints")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_named(said):
    assert "the disk is full" in said["while writing"]
    assert_has_numbers(said["while writing"], "/checkpoints/.tmp-step-000003")


def test_after_either_error_the_previous_checkpoint_loads_and_nothing_is_left_over(said):
    assert said["left"] == ["step-000001"] and said["loaded"] == [1, True]


def test_every_writer_names_the_path_and_leaves_nothing_half_written(said):
    assert len(said["writers"]) > 5
    for writer in said["writers"]:
        assert writer["code"] == 74 and writer["left"] == [], writer
        assert writer["name"] in writer["said"] and "No space left" in writer["said"], writer


def test_a_run_that_has_no_room_for_a_checkpoint_does_not_start(said):
    assert said["exit code"] == 74 and said["steps"] == 0
    assert_has_numbers(said["command"], "/run")

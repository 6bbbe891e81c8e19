"""The memory of the machine, and refusing what cannot fit in it."""

import os

import pytest

from hotlap.common import memory

GROUPS_2 = "0::/user/job\n"
GROUPS_1 = "4:memory:/user/job\n3:cpu,cpuacct:/user\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (GROUPS_2, {"user/job/memory.max": "3000\n", "user/memory.max": "2000\n"}, {3000, 2000}),
        (GROUPS_2, {"user/job/memory.max": "max\n"}, set()),
        (GROUPS_2, {"memory.max": "1000\n"}, {1000}),  # a container that sees its own group as the root
        (GROUPS_1, {"memory/user/job/memory.limit_in_bytes": "5000\n", "cpu/user/memory.max": "1\n"}, {5000}),
        (GROUPS_1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, {9223372036854771712}),
        ("", {"memory.max": "1000\n"}, set()),
    ],
)
def test_the_limits_of_control_groups_are_found(tmp_path, groups, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert set(memory.limits(groups, tmp_path)) == expected


def test_the_machine_has_at_most_its_memory():
    assert 0 < memory.machine_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_only_what_exceeds_all_of_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 8_000_000_000)
    memory.require_memory("this", 8e9, "ask for less")
    with pytest.raises(
        ValueError, match=r"^that needs at least 8.1 GB, and this machine has 8.0 GB; lower it"
    ):
        memory.require_memory("that", 8.1e9, "lower it")
    with pytest.raises(ValueError, match=r"each process has 2.0 GB"):
        memory.require_memory("this", 3e9, "lower it", processes=4)
    with pytest.raises(ValueError, match=r"at least 1e\+30 GB"):
        memory.require_memory("that", 10**39, "lower it")

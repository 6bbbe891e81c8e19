"""The filter of system calls, run by an interpreter of classic BPF, for both processors."""

import struct

import pytest

from hotlap.model.syscall_filter import (
    ALLOW,
    ALLOWED,
    ALLOWED_IF,
    ARCHITECTURES,
    FIRST_NEW,
    KILL,
    REFUSE,
    UNKNOWN,
    X32,
    syscall_filter,
)  # fmt: skip


def decide(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel does at a system call."""
    words = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, architecture, 0, *words)
    rows = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    while True:
        code, yes, no, operand = rows[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return operand
        else:
            holds = value == operand if code == 0x15 else value >= operand
            assert code in (0x15, 0x35)
            at += yes if holds else no


@pytest.fixture(params=ARCHITECTURES)
def filtered(request):
    """A function from a system call's name or number, and its arguments, to the filter's decision."""
    column = list(ARCHITECTURES).index(request.param)
    program = syscall_filter(request.param)
    named = {name: numbers[column] for name, numbers, _ in ALLOWED_IF}

    def decision(call: str | int, *arguments: int) -> int:
        number = named[call] if isinstance(call, str) else call
        return decide(program, ARCHITECTURES[request.param], number, *arguments)

    decision.column, decision.program, decision.named = column, program, named
    return decision


def test_only_listed_calls_are_allowed(filtered):
    allowed = {numbers[filtered.column] for numbers in ALLOWED.values()}
    for number in set(range(1000)) - set(filtered.named.values()):
        expected = ALLOW if number in allowed else REFUSE if number < FIRST_NEW else UNKNOWN
        assert filtered(number) == expected, number


def test_other_architectures_and_x32_end_the_process(filtered):
    for architecture in (0x40000003, 0x40000028, 0, *set(ARCHITECTURES.values())):
        if architecture != list(ARCHITECTURES.values())[filtered.column]:
            assert decide(filtered.program, architecture, 39) == KILL
    assert filtered(X32 + 39) == filtered(0xFFFFFFFF) == KILL


def test_clone_makes_threads_only(filtered):
    thread = 0x3D0F00  # as C libraries ask for one
    assert filtered("clone", thread) == ALLOW
    assert filtered("clone", 17) == filtered("clone", 0x4111) == REFUSE
    for namespace in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert filtered("clone", thread | namespace) == REFUSE


def test_arguments_decide(filtered):
    assert filtered("socketpair", 1, 1 | 0x80000 | 0x800) == ALLOW
    assert filtered("socketpair", 1, 2) == filtered("socketpair", 2, 1) == REFUSE
    assert filtered("prlimit64", 0) == ALLOW and filtered("prlimit64", 1) == REFUSE
    assert [filtered("fcntl", 3, command) for command in (0, 1, 2, 3, 4, 1030)] == [ALLOW] * 6
    assert [filtered("fcntl", 3, command) for command in (8, 10, 15, 1024, 1026, 1031, 1033)] == [REFUSE] * 7
    assert filtered("ioctl", 1, 0x5401) == ALLOW and filtered("ioctl", 1, 0x5412) == REFUSE
    private, shared, anonymous = 2, 1, 0x20
    for flags in (private, private | anonymous, shared | anonymous):
        assert filtered("mmap", 0, 1, 3, flags) == ALLOW
    assert filtered("mmap", 0, 1, 3, shared) == filtered("mmap", 0, 1, 3, 3) == REFUSE
    truncate, write = 0x200, 1
    assert filtered("openat", 0, 0, truncate | write) == filtered("openat", 0, 0, 0) == ALLOW
    assert filtered("openat", 0, 0, truncate) == filtered("openat", 0, 0, truncate | 0x80000) == REFUSE


def test_other_processors_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="x86_64 and aarch64, not riscv64"):
        syscall_filter("riscv64")

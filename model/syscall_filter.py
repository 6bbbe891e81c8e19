"""A seccomp filter for a Python program that may compute, use threads, and use files that it can reach.

It lists what is allowed, and refuses the rest: a kernel grows by several system calls a year, which a list of
what is forbidden would let through. Refused calls fail with EPERM, so that programs see a PermissionError and
go on. Calls that came with Linux 5.1 or later fail with ENOSYS, as on an older kernel, because C libraries
then take the older call: threads start with clone, whose flags a filter can read, and not with clone3, whose
flags it cannot.

Capabilities, Landlock and namespaces do not cover all that the allowed calls could do, so arguments are
looked at: `fcntl` can have signals sent to other processes, `open` can truncate a file that is only readable,
and shared mappings of files write without being counted.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator

# seccomp's actions
ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000
# classic BPF: load a word of seccomp_data, and, jump if equal, jump if not less, return
LOAD, AND, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # in seccomp_data; an argument's low word comes first
FIRST_NEW = 424  # from here on, all architectures have the same numbers; these are Linux 5.1 and later
X32 = 0x40000000  # added to the numbers of x86_64's other ABI, whose calls have the same architecture

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
Numbers = dict[str, tuple[int | None, int | None]]  # of x86_64 and aarch64, None where there is no such call

ALLOWED: Numbers = {
    # files that are open, or that the namespace or Landlock let it open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "umask": (95, 166), "creat": (85, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276),
    # waiting for them
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    # its end of a pair of sockets, which asyncio makes; other sockets cannot be made
    "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    # memory, threads, and signals to itself that timers send
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168), "exit": (60, 93),
    "exit_group": (231, 94), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "alarm": (37, None), "pause": (34, None),
    "setitimer": (38, 103), "getitimer": (36, 102),
    # time, chance, and questions about itself
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getpgrp": (111, None),
    "getsid": (124, 156),
}  # fmt: skip

THREAD, NEW_NAMESPACES = 0x10000, 0x7E020000  # flags of clone
SHARED, ANONYMOUS = 0x01, 0x20  # of mmap
ACCESS_MODE, TRUNCATE = 0x3, 0x200  # of open
UNIX, STREAM, TYPE = 1, 1, 0xF  # of socketpair
DUPLICATE, GET_LOCK, DUPLICATE_CLOEXEC = 0, 5, 1030  # commands of fcntl
# of ioctl: is it a terminal (old and new), its size, bytes to read, blocking, inherited or not
HARMLESS_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)

# name, numbers, then tests of (argument, mask, values), which all must hold
ALLOWED_IF = (
    ("clone", (56, 220), ((0, THREAD | NEW_NAMESPACES, (THREAD,)),)),
    ("socketpair", (53, 199), ((0, 0xFFFFFFFF, (UNIX,)), (1, TYPE, (STREAM,)))),
    ("prlimit64", (302, 261), ((0, 0xFFFFFFFF, (0,)),)),  # of itself
    ("fcntl", (72, 25), ((1, 0xFFFFFFFF, (*range(DUPLICATE, GET_LOCK + 3), DUPLICATE_CLOEXEC)),)),
    ("ioctl", (16, 29), ((1, 0xFFFFFFFF, HARMLESS_IOCTLS),)),
    ("mmap", (9, 222), ((3, SHARED | ANONYMOUS, (0, ANONYMOUS, SHARED | ANONYMOUS)),)),
    ("open", (2, None), ((1, ACCESS_MODE | TRUNCATE, (0, 1, 2, TRUNCATE | 1, TRUNCATE | 2)),)),
    ("openat", (257, 56), ((2, ACCESS_MODE | TRUNCATE, (0, 1, 2, TRUNCATE | 1, TRUNCATE | 2)),)),
)


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, for a machine as `platform.machine()` names it.

    Raises:
        ValueError: for another processor than x86_64 and aarch64.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"the filter of system calls knows {' and '.join(ARCHITECTURES)}, not {machine}")
    return b"".join(struct.pack("<HBBI", *row) for row in _instructions(machine))


def _instructions(machine: str) -> Iterator[tuple[int, int, int, int]]:
    """Operation, instructions to skip if a test holds, and if not, and the operand."""
    column = list(ARCHITECTURES).index(machine)
    yield LOAD, 0, 0, ARCHITECTURE_AT
    yield IF_EQUAL, 1, 0, ARCHITECTURES[machine]
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, NUMBER_AT
    yield IF_AT_LEAST, 0, 1, X32
    yield RETURN, 0, 0, KILL
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            yield IF_EQUAL, 0, 1, number
            yield RETURN, 0, 0, ALLOW
    for _, numbers, tests in ALLOWED_IF:
        if (number := numbers[column]) is not None:
            rows = [row for test in tests for row in _test(*test)]
            yield IF_EQUAL, 0, len(rows) + 1, number
            yield from rows
            yield RETURN, 0, 0, ALLOW
    yield IF_AT_LEAST, 0, 1, FIRST_NEW
    yield RETURN, 0, 0, UNKNOWN
    yield RETURN, 0, 0, REFUSE


def _test(argument: int, mask: int, values: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Refuse unless an argument, masked, is one of values. What is tested is in the low word."""
    yield LOAD, 0, 0, ARGUMENTS_AT + 8 * argument
    yield AND, 0, 0, mask
    for i, value in enumerate(values):
        yield IF_EQUAL, len(values) - i, 0, value
    yield RETURN, 0, 0, REFUSE

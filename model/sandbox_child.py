"""What runs in the sandbox's process: it takes its own rights away, then runs a program.

`model/sandbox.py` starts it as `python -I -S -c SOURCE DESCRIPTOR`, so it imports the standard library alone.
The descriptor is a file with the marshalled request: the program and what it may use. If a right cannot be
taken away, this ends before the program starts. What takes long to import is imported when it is needed.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import struct
import sys
import types

NAME = "program.py"  # of the program, in tracebacks
OUT_OF_MEMORY = 71  # the exit code; as in common/errors.py
SPARE_MEMORY = 32 * 1024 * 1024  # bytes to show the error with

# of prctl, seccomp, and capset
PARENT_DEATH_SIGNAL, SECCOMP, FILTER, NO_NEW_PRIVILEGES = 1, 22, 2, 38
KILL = 9
CAPABILITIES_3 = 0x20080522
# Landlock: system calls, which have these numbers on all architectures, and access rights by the bit of each
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
REMOVE_FILE, MAKE_FILE, TRUNCATE = 1 << 5, 1 << 8, 1 << 14
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights by version; later ones have 16
NETWORK_SINCE, SCOPES_SINCE = 4, 6


class FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def main() -> None:
    with open(int(sys.argv[1]), "rb") as file:
        request = marshal.load(file)
    os.closerange(3, 1024)  # the parent passes none, and bubblewrap should leave none
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    if request["landlock"]:  # otherwise bubblewrap has done the like
        parent, readable, writable = request["landlock"]
        _end_with(parent, libc)
        _drop_capabilities(libc)
        _confine_files(readable, writable, libc)
    _set_limits(request["limits"])
    program = _program(request["code"])
    _filter_system_calls(request["filter"], libc)
    program()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _end_with(parent: int, libc: ctypes.CDLL) -> None:
    _check(libc.prctl(PARENT_DEATH_SIGNAL, KILL, 0, 0, 0), "end with the parent")
    if os.getppid() != parent:  # it has ended before we asked
        os._exit(1)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root's. As the program cannot call execve, it does not get them back."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")


def landlock_version(libc: ctypes.CDLL) -> int:
    """Of Landlock's interface, from 1. OSError where the kernel has none, or it is turned off."""
    return _check(libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG), "Landlock")


def _confine_files(readable: tuple[str, ...], writable: str, libc: ctypes.CDLL) -> None:
    version = landlock_version(libc)
    handled = (1 << RIGHTS.get(version, 16)) - 1
    network = 3 if version >= NETWORK_SINCE else 0
    scopes = 3 if version >= SCOPES_SINCE else 0  # abstract sockets and signals of other processes
    attributes = (ctypes.c_uint64 * 3)(handled, network, scopes)
    size = 8 * (1 + (version >= NETWORK_SINCE) + (version >= SCOPES_SINCE))
    rules = _check(libc.syscall(CREATE_RULESET, attributes, size, 0), "Landlock's rules")
    own = READ_FILE | READ_FOLDER | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE
    allowed = dict.fromkeys(readable, READ_FILE | READ_FOLDER)
    allowed |= {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE, writable: own}
    for path, rights in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, folder)
        _check(libc.syscall(ADD_RULE, rules, PATH_BENEATH, rule, 0), f"Landlock, {path}")
        os.close(folder)
    _check(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def _set_limits(limits: dict[str, int]) -> None:
    import resource  # which Windows has not

    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        hard = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        soft = hard - SPARE_MEMORY if name == "AS" else hard
        resource.setrlimit(kind, (soft, hard))


def _filter_system_calls(program: bytes, libc: ctypes.CDLL) -> None:
    rows = FilterProgram(len(program) // 8, program)
    _check(libc.prctl(SECCOMP, FILTER, ctypes.byref(rows), 0, 0), "seccomp")


def _program(code: bytes) -> types.FunctionType:
    """A function that runs the code as Python runs a file."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, [NAME]
    sys.excepthook = lambda *error: _show(code, *error)
    sys.stdout.reconfigure(errors="backslashreplace")  # as of standard error
    os.environ.clear()
    return lambda: exec(compile(code, NAME, "exec", dont_inherit=True), module.__dict__)


def _show(code: bytes, kind: type, error: BaseException, place: types.TracebackType | None) -> None:
    """Print the traceback from the program's first line on."""
    if isinstance(error, MemoryError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    import linecache
    import traceback

    text = code.decode("utf-8", "replace")
    linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
    while place and place.tb_frame.f_code.co_filename != NAME:
        place = place.tb_next
    traceback.print_exception(kind, error, place)
    if isinstance(error, MemoryError):
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()

"""What runs in the sandbox's process: it takes its own rights away, then runs a program.

`model/sandbox.py` starts it as `python -I -S -c SOURCE DESCRIPTOR`, so it imports the standard library alone. The
descriptor is a file with the marshalled request: the program and what it may use. If a right cannot be taken away,
this ends before the program starts.
"""

from __future__ import annotations

import ctypes
import linecache
import marshal
import os
import signal
import sys
import traceback
import types

NAME = "program.py"  # of the program, in tracebacks
OUT_OF_MEMORY = 71  # the exit code; as in common/errors.py

# of prctl, seccomp, and capset
PARENT_DEATH_SIGNAL, SECCOMP, FILTER, NO_NEW_PRIVILEGES = 1, 22, 2, 38
CAPABILITIES_3 = 0x20080522
# Landlock: system calls, which have these numbers on all architectures, and access rights by the bit of each
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
REMOVE_FOLDER, REMOVE_FILE, MAKE_FOLDER, MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights by version; later ones have 16
NETWORK_SINCE, SCOPES_SINCE = 4, 6


class FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # which Python 3.14 wants to be told for packed structures
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def main() -> None:
    with open(int(sys.argv[1]), "rb") as file:
        request = marshal.load(file)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    libc = ctypes.CDLL(None, use_errno=True)
    if request["parent"]:  # bubblewrap sees to it otherwise
        _end_with(request["parent"], libc)
        _drop_capabilities(libc)
    _check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    if request["writable"]:
        _confine_files(request["readable"], request["writable"], libc)
    _set_limits(request["limits"])
    _prepare_streams()
    program = _program(request["code"])
    _filter_system_calls(request["filter"], libc)
    program()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _end_with(parent: int, libc: ctypes.CDLL) -> None:
    _check(libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "end with the parent")
    if os.getppid() != parent:  # it has ended before we asked
        os._exit(1)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root's. As the program cannot call execve, it does not get them back."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")


def landlock_version(libc: ctypes.CDLL) -> int:
    """Of Landlock's interface, from 1. OSError where the kernel has none, or it is turned off."""
    return _check(libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG), "Landlock")


def _confine_files(readable: list[str], writable: str, libc: ctypes.CDLL) -> None:
    version = landlock_version(libc)
    handled = (1 << RIGHTS.get(version, 16)) - 1
    network = 3 if version >= NETWORK_SINCE else 0
    scopes = 3 if version >= SCOPES_SINCE else 0  # abstract sockets and signals of other processes
    attributes = (ctypes.c_uint64 * 3)(handled, network, scopes)
    size = 8 * (1 + (version >= NETWORK_SINCE) + (version >= SCOPES_SINCE))
    rules = _check(libc.syscall(CREATE_RULESET, attributes, size, 0), "Landlock's rules")
    own = READ_FILE | READ_FOLDER | WRITE_FILE | REMOVE_FILE | REMOVE_FOLDER | MAKE_FILE | MAKE_FOLDER
    allowed = dict.fromkeys(readable, READ_FILE | READ_FOLDER)
    allowed |= {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE, writable: own | REFER | TRUNCATE}
    for path, rights in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = PathRule(rights & handled, folder)
        _check(
            libc.syscall(ADD_RULE, rules, PATH_BENEATH, ctypes.byref(rule), 0), f"Landlock's rule of {path}"
        )
        os.close(folder)
    _check(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def _set_limits(limits: dict[str, int]) -> None:
    import resource  # which Windows has not

    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _filter_system_calls(program: bytes, libc: ctypes.CDLL) -> None:
    rows = FilterProgram(len(program) // 8, program)
    _check(libc.prctl(SECCOMP, FILTER, ctypes.byref(rows), 0, 0), "seccomp")


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        # each write at once: both keep their order, and nothing is lost when the process is killed
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", write_through=True)


def _program(code: bytes) -> types.FunctionType:
    """A function that runs the code as Python runs a file."""
    text = code.decode("utf-8", "replace")
    linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, [NAME]
    sys.excepthook = _show
    os.environ.clear()
    return lambda: exec(compile(code, NAME, "exec", dont_inherit=True), module.__dict__)


def _show(kind: type[BaseException], error: BaseException, place: types.TracebackType | None) -> None:
    """Print the traceback from the program's first line on."""
    while place and place.tb_frame.f_code.co_filename != NAME:
        place = place.tb_next
    traceback.print_exception(kind, error, place)
    if isinstance(error, MemoryError):
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()

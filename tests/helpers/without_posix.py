"""A process that finds what Windows has and no more, as far as that can be had on another system."""

import asyncio
import ctypes
import errno
import fcntl
import os
import select
import shutil
import signal
import sys
import sysconfig
import types

MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "triton", "tty")
FUNCTIONS = (
    "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid", "getuid", "killpg", "mkfifo", "nice",
    "sched_getaffinity", "sched_setaffinity", "setsid", "sysconf", "uname",
)  # fmt: skip
SIGNALS = (
    "SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "pthread_sigmask",
    "setitimer",
)  # fmt: skip
MEMORY = 8_000_000_000  # bytes


def hide() -> None:
    """Take away what only POSIX has, and its folders. Call it after the libraries are imported: they have
    chosen by system already.
    """
    sysconfig.get_config_vars()  # from a file that is named by the system
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    for name in MODULES:
        sys.modules[name] = None
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS), (select, ("poll", "epoll"))):
        for name in names:
            vars(module).pop(name, None)
    os.open, os.stat, os.fsync = opening(os.open), finding(os.stat), flushing(os.fsync)
    select.select = no_select
    shutil._use_fd_functions = False  # it opens folders elsewhere
    ctypes.CDLL = no_process(ctypes.CDLL)
    ctypes.windll = types.SimpleNamespace(kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=memory_status))
    asyncio.SelectorEventLoop.add_signal_handler = no_signal_handler
    sys.platform = "win32"


def locking(descriptor: int, mode: int, count: int) -> None:
    """msvcrt's, of bytes at the file's position. The system's own locks are one process's, as there."""
    assert (mode, count) == (2, 1)
    try:
        os.lockf(descriptor, os.F_TLOCK, count)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def opening(open_file):
    def opened(path, flags, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, *more, **options)

    return opened


def flushing(flush):
    def flushed(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flush(descriptor)

    return flushed


def finding(stat):
    def found(path, *more, **options):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return stat(path, *more, **options)

    return found


def no_select(*given):
    raise OSError(errno.ENOTSOCK, "not a socket")


def no_process(load):
    def loaded(name, *more, **options):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return load(name, *more, **options)

    return loaded


def no_signal_handler(*given):
    raise NotImplementedError


def memory_status(status) -> int:
    assert status[0] == ctypes.sizeof(status) == 64
    status[1] = status[2] = MEMORY
    return 1

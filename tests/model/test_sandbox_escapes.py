"""What a program in the sandbox cannot do, in each tier that works on this machine."""

import os
import platform
import socket
import sys
import tempfile

import pytest
from helpers.sandboxes import TIERS, escapes, needed

REFUSED = {  # system calls by their numbers on x86_64 and aarch64
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "kcmp": (312, 272), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "add_key": (248, 217), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "personality": (135, 92),
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "mq_open": (240, 180),
    "kexec_load": (246, 104), "init_module": (175, 105), "open_by_handle_at": (304, 265),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262), "pidfd_open": (434, 434), "clone3": (435, 435),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "prctl": (157, 167), "seccomp": (317, 277),
    "execve": (59, 221), "execveat": (322, 281), "mknodat": (259, 33), "symlinkat": (266, 36),
    "linkat": (265, 37), "fchmodat": (268, 53), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "fallocate": (285, 47), "splice": (275, 76), "socket": (41, 198), "bind": (49, 200),
    "connect": (42, 203), "sendmsg": (46, 211), "setuid": (105, 146), "capset": (126, 91),
    "reboot": (169, 142), "timer_create": (222, 107), "mlock": (149, 228), "truncate": (76, 45),
    "openat2": (437, 437), "mkdirat": (258, 34), "memfd_secret": (447, 447),
}  # fmt: skip
COLUMN = 0 if platform.machine() == "x86_64" else 1


@pytest.fixture(params=TIERS)
def box(request):
    return needed(request.param)


def test_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = escapes(
            box,
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)",
            "socket.create_server(('127.0.0.1', 0))",
            "socket.getaddrinfo('localhost', 80)",
            *(f"socket.socket(socket.{kind})" for kind in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK")),
            "socket.socketpair(type=socket.SOCK_DGRAM)",
            "__import__('urllib.request').request.urlopen('http://127.0.0.1')",
        )
    assert found == ["refused"] * 9


def test_no_abstract_sockets(box):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0hotlap-{os.getpid()}")
        name = server.getsockname()
        found = escapes(
            box,
            f"socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', {name!r})",
            f"pair[0].sendto(b'x', {name!r})",
            f"pair[0].connect({name!r})",
            before="pair = socket.socketpair()",
        )
    assert found == ["refused"] * 3


def test_no_file_of_the_machine_can_be_read(box, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    with tempfile.NamedTemporaryFile() as temporary:
        places = (
            secret,
            temporary.name,
            __file__,
            sys.prefix + "/pyvenv.cfg",
            "/etc/passwd",
            "/etc/hostname",
        )
        places += ("/proc/1/cmdline", "/proc/self/maps", "/sys/kernel/version", "/dev/mem", "/dev/tty")
        opened = (f"open({str(path)!r}).read(1)" for path in places)
        found = escapes(box, *opened, f"os.listdir({str(tmp_path)!r})")
    assert found == ["refused"] * (len(places) + 1)


def test_no_environment_of_the_parent(box, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", "a secret")
    processes = ("{os.getppid()}", "self", "1", str(os.getpid()))
    files = (
        f"open(f'/proc/{p}/{file}', 'rb').read(1)" for p in processes for file in ("environ", "mem", "maps")
    )
    assert escapes(box, *files) == ["refused"] * 12
    assert box.run("import os; print(os.environ, len(os.environ))").text == "environ({}) 0\n"


def test_nothing_is_written_outside_of_its_folder(box, tmp_path):
    existing = tmp_path / "existing"
    existing.write_text("as it was")
    before = existing.stat()
    library = os.__file__
    path = repr(str(existing))
    found = escapes(
        box,
        f"open({path}, 'w')",
        f"open({path}, 'a')",
        f"os.truncate({path}, 0)",
        f"os.remove({path})",
        f"os.rename({path}, 'mine')",
        f"os.chmod({path}, 0o777)",
        f"os.utime({path}, (0, 0))",
        f"os.link({path}, 'mine')",
        f"os.symlink({path}, 'mine')",
        f"os.open({library!r}, os.O_RDONLY | os.O_TRUNC)",
        f"open({library!r}, 'a')",
        f"os.utime({library!r}, (0, 0))",
        f"os.chmod({library!r}, 0o644)",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        "open('/new', 'w')",
        "open('/tmp/new', 'w')",
        "open('../new', 'w')",
        "open('/dev/shm/new', 'w')",
        "open('/usr/lib/new', 'w')",
    )
    assert found == ["refused"] * 19
    after = existing.stat()
    for name in ("st_mode", "st_size", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name)
    assert (
        existing.read_text() == "as it was"
        and os.path.getsize(library)
        and [p.name for p in tmp_path.iterdir()] == ["existing"]
    )


def test_no_new_process(box):
    found = escapes(
        box,
        "os.fork()",
        "os.forkpty()",
        "os.execv('/bin/sh', ['sh'])",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "importlib.reload(os).fork()",
        "posix.fork()",
        "subprocess.run(['true'])",
        "subprocess.run('true', shell=True)",
        "multiprocessing.Process(target=print).start()",
        before="import importlib, multiprocessing, posix, subprocess",
    )
    assert found == ["refused"] * 9
    code = "import ctypes, os; print(os.system('echo it ran') != 0, ctypes.CDLL(None).fork())"
    assert box.run(code, 10).text == "True -1\n"


def test_clone_makes_threads_only(box):
    clone = (56, 220)[COLUMN]
    flags = (17, 0x4111, 0x10000000 | 17, 0x00000F00 | 17, 0)  # fork, vfork, a user namespace, shared memory
    found = escapes(box, *(f"call({clone}, {value}, 0, 0, 0, 0)" for value in flags))
    assert found == ["refused"] * 5


def test_system_calls_that_no_program_needs_are_refused(box):
    numbers = {name: numbers[COLUMN] for name, numbers in REFUSED.items()}
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers}.items():\n"
        "    print(name, libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())"
    )
    answers = dict(line.split(" ", 1) for line in box.run(code, 10).text.splitlines())
    expected = {name: "-1 38" if number >= 424 else "-1 1" for name, number in numbers.items()}
    assert answers == expected  # ENOSYS or EPERM: the filter's


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86_64")
def test_other_abis_of_the_processor_end_the_program(box):
    x32 = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39); print('escaped')"
    assert box.run(x32, 10)[:2] == ("", False)
    i386 = (  # getpid by the interrupt of 32-bit programs
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
        "print('escaped')"
    )
    assert box.run(i386, 10)[:2] == ("", False)


def test_no_signal_to_another_process(box):
    found = escapes(
        box,
        *(f"os.kill({target}, 0)" for target in (os.getpid(), 1, -1, 0, "os.getppid()")),
        "os.killpg(0, 0)",
        f"fcntl.fcntl(pipe[0], fcntl.F_SETOWN, {os.getpid()})",  # who is sent SIGIO
        "fcntl.fcntl(pipe[0], 10, 9)",  # F_SETSIG
        "fcntl.ioctl(pipe[0], 0x5412, b'x')",  # TIOCSTI
        f"__import__('resource').prlimit({os.getpid()}, 0, (1, 1))",
        before="import fcntl; pipe = os.pipe()",
    )
    assert found == ["refused"] * 10


def test_no_descriptor_is_inherited_but_the_standard_three(box, tmp_path):
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = (
            "import os\nfor i in range(64):\n    try:\n        print(i, os.fstat(i) and '')\n"
            "    except OSError:\n        pass"
        )
        assert [int(line) for line in box.run(code).text.split()] == [0, 1, 2]


def test_descriptors_that_it_has_lead_nowhere(box):
    found = escapes(
        box,
        "os.write(0, b'x')",
        "os.read(1, 1)",
        "os.open('..', os.O_RDONLY, dir_fd=0)",
        "os.listdir('/proc/self/fd')",
        "os.listdir('/dev/fd')",
    )
    assert found == ["refused"] * 5


def test_rights_are_not_regained(box):
    found = escapes(
        box,
        "os.setuid(0)",
        "os.setgroups([])",
        "os.chroot('.')",
        "libc.prctl(38, 0, 0, 0, 0) and os.kill(1, 0)",
        "libc.unshare(0x10000000) and os.kill(1, 0)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
        before="import resource",
    )
    assert found == ["refused"] * 7


def test_files_are_not_written_through_shared_mappings(box):
    """Only write calls are counted."""
    found = escapes(
        box, "mmap.mmap(file.fileno(), 4096)",
        before="import mmap; file = open('own', 'w+b'); file.truncate(4096)",
    )  # fmt: skip
    assert found == ["refused"]

"""A program on a terminal of its own, and a chat there whose model repeats what it is told."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from hotlap.model.config import Sampling
from hotlap.serve.terminal.conversation import Chat
from hotlap.serve.terminal.session import Session, converse

PARROT = (sys.executable, "-c", "from helpers.terminal import chat; chat()")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"  # marks of a pasted block


class Terminal:
    """Runs a command on a pseudo-terminal. All that it printed is in `output`."""

    def __init__(self, *command: str, folder: Path, **environment: str):
        self.leader, follower = pty.openpty()
        self.output, self.seen = "", 0
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        ours = {"PYTHONPATH": paths, "PYTHONUTF8": "1", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        ours |= {"XDG_STATE_HOME": str(folder / "state")} | environment
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=inherited | ours,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches the command
        )  # fmt: skip
        os.close(follower)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.leader)

    def type(self, keys: str | bytes) -> None:
        left = keys.encode() if isinstance(keys, str) else keys
        while left:  # the terminal takes some at a time, and shows them
            if select.select([], [self.leader], [], 0.01)[1]:
                left = left[os.write(self.leader, left[:1000]) :]
            self.read(0)

    def read(self, seconds: float) -> bool:
        """Read what was printed; False if nothing was, or the command has ended."""
        if not select.select([self.leader], [], [], seconds)[0]:
            return False
        try:
            found = os.read(self.leader, 1 << 16)
        except OSError:  # the command has ended
            return False
        self.output += found.decode(errors="replace").replace("\r", "")
        return bool(found)

    def expect(self, text: str, seconds: float = 20) -> None:
        """Wait until the text has been printed after the last one that was expected."""
        end = time.monotonic() + seconds
        while text not in self.output[self.seen :]:
            self.read(0.05)
            assert time.monotonic() < end, f"{text!r} is not in {self.output[self.seen :][-2000:]!r}"
            assert self.process.poll() is None or self.read(0) or text in self.output[self.seen :], (
                self.output
            )
        self.seen = self.output.index(text, self.seen) + len(text)

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until the text is printed: what comes just before Python's readline waits for a key
        has no effect until the next one.
        """
        for _ in range(10):
            self.type(CTRL_C)
            end = time.monotonic() + 1
            while text not in self.output[self.seen :] and time.monotonic() < end:
                self.read(0.05)
            if text in self.output[self.seen :]:
                break
        self.expect(text)

    def ask(self, keys: str, answer: str) -> None:
        """Enter something at a prompt, and wait for what is printed then."""
        self.expect("> ")
        self.type(f"{keys}\n")
        self.expect(answer)

    def ended(self) -> int:
        """The exit code of the command, which is about to end."""
        while self.read(1):
            pass
        return self.process.wait(10)


def plain(output: str) -> str:
    """What a terminal shows, without its modes and colours."""
    return re.sub(r"\x1b(\[[?0-9;]*([a-zA-Z]|$)|$)", "", output)


class Parrot(Chat):
    """Answers with what it was asked, in quotes, and counts until it is stopped."""

    def answer(self, question: str) -> Iterator[str]:
        if question == "count":
            for number in itertools.count():
                time.sleep(0.01)
                yield f"{number} "
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "..."}]
        yield f"heard {question!r}" if len(question) < 1000 else f"heard {len(question)} characters"


def chat() -> None:
    """A session with a `Parrot`."""
    sys.stdin.reconfigure(errors="replace")
    converse(Session(Parrot(None, Sampling()), Path("parrot"), lambda folder: None))

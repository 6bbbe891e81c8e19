"""`--tracker`: a process of its own sends the lines of metrics.jsonl to wandb, trackio or TensorBoard.

It follows the file, so training never waits for it, however slow it is, and nothing piles up in memory. If it
fails, a warning says so, and the run goes on without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hotlap.common.log import log
from hotlap.common.process import end_session
from hotlap.common.terminal import printable

OUTPUT = "tracker.log"  # in the run's folder: what the tracker prints
LAST_SECONDS = 15.0  # that the tracker gets for the end of the run: to start if it has not yet, and to send


def check_tracker(tracker: str) -> None:
    """Raise ImportError if the tracker's package is missing. Imports nothing."""
    if tracker == "none":
        return
    found = find_spec(tracker)
    if found is None or found.origin is None:  # a folder of that name, such as that of wandb's files
        raise ImportError(f"--tracker {tracker} needs the package {tracker}: pip install 'hotlap[trackers]'")


@contextmanager
def tracked(tracker: str, run: Path) -> Iterator[None]:
    """Send what is appended to the run's metrics.jsonl to a tracker, or to `none`."""
    if tracker == "none":
        yield
        return
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from hotlap.train.run.tracker_process import main\n"
        f"main({tracker!r}, {os.fspath(run)!r})"
    )
    with open(run / OUTPUT, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,  # its end is the end of the run, also if this process is killed
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C is not for it, and its own processes end with it
        )
    log.info("%s: metrics go to %s, too; what it prints is in %s", run, tracker, run / OUTPUT)
    ended = threading.Event()
    watch = threading.Thread(
        target=warn_of_failure, args=(process, tracker, run, ended), name="tracker", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        process.stdin.close()
        watch.join(LAST_SECONDS)
        if watch.is_alive():
            ended.set()
            log.warning(
                "%s: %s has not finished %g s after the run, and is stopped; metrics.jsonl has all there is",
                run, tracker, LAST_SECONDS,
            )  # fmt: skip
            end_session(process)
            watch.join()


def warn_of_failure(process: subprocess.Popen, tracker: str, run: Path, ended: threading.Event) -> None:
    """Wait for the process, and warn unless it ends well, or is ended."""
    if process.wait() and not ended.is_set():
        text = (run / OUTPUT).read_text(encoding="utf-8", errors="replace")
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
        log.warning(
            "%s: %s has failed, and the run goes on without it: %s; %s has more",
            run, tracker, printable(last.strip()[:300]), run / OUTPUT,
        )  # fmt: skip

"""The process that sends a run's metrics to a tracker; its parent is trackers.py.

It reads metrics.jsonl as it grows until its standard input ends, and then what is left. An error ends it,
with a traceback for its parent.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hotlap.common.files import read_object, write_object
from hotlap.common.locks import lock
from hotlap.train.run.metrics import METRICS, step_line
from hotlap.train.run.trackers import OUTPUT

PROJECT = "hotlap"
IDENTITY = "tracker.json"  # in the run's folder, so that a resumed run goes on in the same curves
POLL = 0.5  # seconds between looks at the file
ORPHAN_SECONDS = 60.0  # after the parent has ended or been killed

Log = Callable[[int, dict[str, float]], None]  # (step, its metrics)


@dataclass(frozen=True)
class Identity:
    """What a run is for the trackers."""

    id: str
    name: str
    sent: dict[str, int]
    """The last step that each tracker has."""


def main(tracker: str, run: str) -> None:
    """Send the steps of a run that the tracker does not have yet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    over = threading.Event()
    threading.Thread(target=wait_for_end, args=(over,), daemon=True).start()
    folder = Path(run)
    with open(folder / OUTPUT, "ab") as file:
        lock(file, wait=True)  # for the process of a run that was killed, which still sends
        send(tracker, folder, over)


def send(tracker: str, run: Path, over: threading.Event) -> None:
    """Send steps until the run is over. What is sent is noted as it is, for this process may be killed."""
    identity = identity_of(run)
    config = read_object(run / "config.json") if (run / "config.json").exists() else {}
    with TRACKERS[tracker](run, identity, config) as log:
        identity.sent.setdefault(tracker, -1)
        note(run, identity)
        for lines in appended(run / METRICS, over):
            try:
                for values in lines:
                    step = values.pop("step")
                    if step > identity.sent[tracker]:  # others have been taken again
                        log(step, {k: v for k, v in values.items() if type(v) in (int, float)})
                        identity.sent[tracker] = step
            finally:
                note(run, identity)


def wait_for_end(over: threading.Event) -> None:
    """Wait until the parent closes its end of standard input, or has ended."""
    while os.read(0, 1):  # sys.stdin has a lock, which the end of Python would fail to get
        pass
    over.set()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def appended(path: Path, over: threading.Event) -> Iterator[list[dict]]:
    """The lines of metrics.jsonl, as they are written, until the run is over."""
    rest, last = b"", False
    with open(path, "rb") as file:
        while not last:
            last = over.wait(POLL)
            *lines, rest = (rest + file.read()).split(b"\n")
            if lines:
                yield [*filter(None, map(step_line, lines))]


def identity_of(run: Path) -> Identity:
    """A run's identity, made when it is first tracked. Its name is that of its folder, with the one above."""
    path = run / IDENTITY
    if not path.exists():
        return Identity(secrets.token_hex(4), "/".join(run.resolve().parts[-2:]), {})
    found = read_object(path)
    return Identity(str(found["id"]), str(found["name"]), dict(found["sent"]))


def note(run: Path, identity: Identity) -> None:
    write_object(run / IDENTITY, asdict(identity))


@contextmanager
def wandb_run(run: Path, identity: Identity, config: dict) -> Iterator[Log]:
    """Offline, unless WANDB_MODE says otherwise or the user is logged in. Files go to run/wandb."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), id=identity.id, name=identity.name, config=config,
        resume="allow", mode=mode, dir=os.environ.get("WANDB_DIR", str(run)),
        settings=wandb.Settings(x_stats_pid=os.getppid()),
    ) as logged:  # fmt: skip
        yield lambda step, values: logged.log(values, step=step)


@contextmanager
def trackio_run(run: Path, identity: Identity, config: dict) -> Iterator[Log]:
    """In a database below the run's folder, unless TRACKIO_DIR names another, which runs can share."""
    os.environ.setdefault("TRACKIO_DIR", str(run / "trackio"))
    import trackio

    known = "trackio" in identity.sent
    trackio.init(
        project=PROJECT, name=identity.name, config=config, resume="allow" if known else "never",
    )  # fmt: skip
    yield lambda step, values: trackio.log(values, step=step)
    trackio.finish()


@contextmanager
def tensorboard_run(run: Path, identity: Identity, config: dict) -> Iterator[Log]:
    """In run/tensorboard, with the configuration as a text. TensorBoard names a run by its folder."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run / "tensorboard"), flush_secs=10)

    def add(step: int, summary: Summary) -> None:
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    if "tensorboard" not in identity.sent:
        text = json.dumps(config, indent=1).replace("\n", "\n\t")  # a block of code in Markdown
        add(0, text_pb("config", f"\t{text}"))
    yield lambda step, values: add(
        step, Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    )
    writer.close()


TRACKERS = {"wandb": wandb_run, "trackio": trackio_run, "tensorboard": tensorboard_run}

"""`hotlap bench look | check | figures`: three calls for a GPU that is there for minutes.

Each stands alone, and is a list of phases. A phase is a process with a time limit, a folder and a log of its
own: a kernel that hangs, or takes the GPU's context with it, ends its phase, and the others have their time.
After each phase everything is packed into one file, and a page that sums it up is printed last.

`python -m hotlap.bench.suite look --out DIR` needs no more than torch, Triton and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hotlap.bench import phases, results
from hotlap.bench.phases import Phase
from hotlap.bench.timing import NO_TIME
from hotlap.common import files
from hotlap.common.errors import DataError, guarded, known
from hotlap.common.log import log, set_up_logging

SHORTEST = 5  # seconds that are worth starting a phase for
GRACE = 10  # seconds that a phase has to end by itself, when its time is over
LAST_LINES = 3  # of the log of a phase that failed, on the page


@dataclass(frozen=True)
class SuiteConfig:
    """Run the phases of a call, and pack what they find into one file."""

    out: Path | None = None
    """Folder for the results, with nothing in it yet; they are packed into a file beside it, OUT.tar.gz. By
    default the call and the date, here."""
    cache: Path | None = None
    """Folder for what Triton and Inductor compile, to be taken to another machine; by default theirs."""
    minutes: float = 0
    """Time for everything; 0 is the call's own. Phases that do not fit are listed."""
    phases: tuple[str, ...] = ()
    """Names of the phases to run, in place of all that the call has."""


def run_suite(call: str, config: SuiteConfig) -> int:
    """Run a call. Returns 1 where a phase failed, else 0."""
    groups = phases.CALLS[known(call, phases.CALLS, "call")]
    names = {phase.name for group in groups for phase in group}
    for name in config.phases:
        known(name, names, "phase")
    if not 0 <= config.minutes < float("inf"):
        raise ValueError(f"minutes={config.minutes} must be positive, or 0 for the call's own")
    out = config.out or Path(f"{call}-{re.sub('[^0-9]+', '-', results.now()).strip('-')}")
    results.check_folder(out)
    if any(out.iterdir()):
        raise ValueError(f"{out} has files, which would pass for what this call finds; name another --out")
    if config.cache:
        for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
            os.environ[variable] = str(config.cache.absolute() / name)
    end = time.monotonic() + 60 * (config.minutes or phases.MINUTES[call])
    outcome: dict[str, str] = {}
    for group in groups:
        chosen = [phase for phase in group if not config.phases or phase.name in config.phases]
        for name, verdict in run_together(chosen, out, end):
            outcome[name] = verdict
            log.info("%-16s %s", name, verdict)
            pack(out, summary(outcome, out))
    print(summary(outcome, out))
    return int(any("FAILED" in verdict for verdict in outcome.values()))


class Running(NamedTuple):
    process: multiprocessing.Process
    phase: Phase
    began: float
    end: float  # of its time, after which it has GRACE
    rows: int  # of results that it found there


def run_together(group: list[Phase], out: Path, end: float):
    """Run phases side by side, as many at once as their places allow; yields each one's name and verdict.

    One that ends before its results are complete, but has measured more than was there before, goes on with
    the rest.
    """
    waiting, running = list(group), []
    while waiting or running:
        places = 1 - sum(run.phase.place for run in running)
        for phase in [phase for phase in waiting if phase.place <= places + 1e-9][:1]:
            waiting.remove(phase)
            if end - time.monotonic() < SHORTEST:
                yield phase.name, NO_TIME
            else:
                running.append(start(phase, out, end))
        for run in list(running):
            now = time.monotonic()
            if run.process.exitcode is None and now < run.end + GRACE:
                continue
            running.remove(run)
            code = finish(run.process)
            rows = unfinished_rows(out / run.phase.name)
            if code is not None and run.rows < rows and run.end - now > SHORTEST:
                running.append(start(run.phase, out, run.end, rows)._replace(began=run.began))
            else:
                yield run.phase.name, verdict(code, time.monotonic() - run.began)
        time.sleep(0.02)


def start(phase: Phase, out: Path, end: float, rows: int = -1) -> Running:
    """Begin a phase, or go on with one that has left so many rows of results."""
    began = time.monotonic()
    seconds = min(phase.seconds, end - began)
    folder = out / phase.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (phase, folder, seconds, rows >= 0)
    process = multiprocessing.get_context("spawn").Process(target=run_phase, args=arguments)
    process.start()
    return Running(process, phase, began, began + seconds, rows)


def run_phase(phase: Phase, folder: Path, seconds: float, resume: bool) -> None:
    """The process of a phase: everything that it and its children say goes to its log."""
    os.setsid()  # so that its children end with it
    with open(folder / "log.txt", "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    set_up_logging()

    def run() -> int:
        try:
            return phase.run(folder, seconds, resume) or 0
        except Exception:
            results.write_traceback(folder, phase.name)
            raise

    sys.exit(guarded(run, debug=True))


def finish(process: multiprocessing.Process) -> int | None:
    """The exit code of a phase, or None where it had to be ended. Its children end with it."""
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        process.kill()
        process.join()
    return code


def verdict(code: int | None, seconds: float) -> str:
    if code is None:
        return f"FAILED: cut off after {seconds:.0f} s; what it had measured is written"
    return f"done in {seconds:.0f} s" if code == 0 else f"FAILED with exit code {code} after {seconds:.0f} s"


def result_files(folder: Path) -> list[dict]:
    """What the files of results in a folder hold."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(DataError):  # of another kind
            found.append(results.load(path))
    return found


def unfinished_rows(folder: Path) -> int:
    """How many rows the results have that say of themselves that they are not complete; -1 where none do."""
    found = [content for content in result_files(folder) if content.get("complete") is False]
    return sum(len(content["rows"]) for content in found) if found else -1


def summary(outcome: dict[str, str], out: Path) -> str:
    """A page: what became of each phase, what it measured in a line a row, and why it failed."""
    lines = []
    for name, said in outcome.items():
        lines.append(f"== {name}: {said}")
        for content in result_files(out / name):
            lines += [short(row) for row in content["rows"]]
        log_file = out / name / "log.txt"
        if "FAILED" in said and log_file.exists():
            last = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
            lines += [f"   {line[:160]}" for line in last]
        note = out / name / "note.txt"
        lines += note.read_text(encoding="utf-8").splitlines() if note.exists() else []
    return "\n".join(lines)


SHOWN = (
    "ms", "tflops", "tb_per_s", "share_of_ceiling", "best_other_over_this", "tokens_per_second",
    "mfu_nanochat", "forward_ms", "backward_ms", "optimizer_ms", "memory_gb", "first_step_s",
    "share_of_bandwidth", "note",
)  # fmt: skip


def short(row: dict) -> str:
    values = [f"{name} {results.shown(row[name])}" for name in SHOWN if row.get(name) is not None]
    return f"   {row['case']} | {row['provider']} | {', '.join(values)}"


def pack(out: Path, page: str) -> None:
    """Write the page, and everything in the folder, to one file beside it."""
    files.write(out / "summary.txt", page + "\n")
    part = out.parent / f".{out.name}.tar.gz.part"
    with tarfile.open(part, "w:gz", compresslevel=3) as archive:
        archive.add(out, out.name)
    part.replace(out.parent / f"{out.name}.tar.gz")


def main(arguments: list[str]) -> int:
    """`hotlap bench look`, `check` and `figures`, whose flags are read without tyro."""
    parser = argparse.ArgumentParser(prog="hotlap bench", description=SuiteConfig.__doc__)
    parser.add_argument("call", help=", ".join(phases.CALLS))
    parser.add_argument(
        "--out", type=Path, help="empty folder for the results; by default the call and the date"
    )
    parser.add_argument("--cache", type=Path, help="folder for what Triton and Inductor compile")
    parser.add_argument("--minutes", type=float, default=0, help="time for everything")
    parser.add_argument("--phases", nargs="*", default=(), help="names of the phases to run; by default all")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    return run_suite(given.call, SuiteConfig(given.out, given.cache, given.minutes, tuple(given.phases)))


def look(arguments: list[str]) -> int:
    return main(["look", *arguments])


def check(arguments: list[str]) -> int:
    return main(["check", *arguments])


def figures(arguments: list[str]) -> int:
    return main(["figures", *arguments])


if __name__ == "__main__":
    set_up_logging()
    raise SystemExit(guarded(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))

"""`hotlap bench look | check | figures`: three independent calls for a GPU that is available for minutes.

A call is a list of phases. Each phase is a process with its own time limit, folder and log, so a kernel that
hangs or corrupts the GPU context ends its own phase only. After each phase, all results are packed into one
file; at the end a summary is printed.

`python -m hotlap.bench.suite look --out DIR` needs only torch, Triton and numpy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

from hotlap.bench import phases, results
from hotlap.bench.cases import NO_TIME
from hotlap.bench.config import SuiteConfig, suite_flags
from hotlap.bench.phases import Phase
from hotlap.common import files
from hotlap.common.errors import DataError, guarded, known
from hotlap.common.log import log, set_up_logging
from hotlap.common.terminal import printable

SHORTEST = 5  # seconds; with less time left, no phase is started
GRACE = 10  # seconds for a phase to exit by itself after its time limit
LAST_LINES = 3  # of a failed phase's log, in the summary


def run_suite(config: SuiteConfig) -> int:
    """Run a call. Returns 1 if a phase failed, else 0."""
    config.validate()
    call = known(config.call, phases.CALLS, "call")
    groups = phases.CALLS[call]
    names = {phase.name for group in groups for phase in group}
    for name in config.phases:
        known(name, names, "phase")
    out = config.out or Path(f"{call}-{re.sub('[^0-9]+', '-', results.now()).strip('-')}")
    results.check_folder(out)
    if any(out.iterdir()):
        raise ValueError(
            f"{out} has files that could be mistaken for results of this call; name another --out"
        )
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
    print(printable(summary(outcome, out)))
    return int(any("FAILED" in verdict for verdict in outcome.values()))


class Running(NamedTuple):
    process: multiprocessing.Process
    phase: Phase
    began: float
    end: float  # time limit, before GRACE
    rows: int  # result rows that an earlier attempt left


def run_together(group: list[Phase], out: Path, end: float):
    """Run phases in parallel, as many at once as their places allow; yields the name and verdict of each.

    A phase that exits with incomplete results is restarted to resume, as long as each attempt adds rows.
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
    """Start a phase. rows: how many an earlier attempt left, to resume from; -1 for a first attempt."""
    began = time.monotonic()
    seconds = min(phase.seconds, end - began)
    folder = out / phase.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (phase, folder, seconds, rows >= 0)
    process = multiprocessing.get_context("spawn").Process(target=run_phase, args=arguments)
    process.start()
    return Running(process, phase, began, began + seconds, rows)


def run_phase(phase: Phase, folder: Path, seconds: float, resume: bool) -> None:
    """Run a phase in this process, with all output of it and its children in its log."""
    os.setsid()  # a process group, so that its children can be killed with it
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
    """The exit code of a phase, or None if it had to be killed. Its children are killed too."""
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        process.kill()
        process.join()
    return code


def verdict(code: int | None, seconds: float) -> str:
    if code is None:
        return f"FAILED: cut off after {seconds:.0f} s; results so far are saved"
    return f"done in {seconds:.0f} s" if code == 0 else f"FAILED with exit code {code} after {seconds:.0f} s"


def result_files(folder: Path) -> list[dict]:
    """The contents of the result files in a folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(DataError):  # not a result file
            found.append(results.load(path))
    return found


def unfinished_rows(folder: Path) -> int:
    """Rows in the result files that are marked incomplete; -1 if there are none."""
    found = [content for content in result_files(folder) if content.get("complete") is False]
    return sum(len(content["rows"]) for content in found) if found else -1


def summary(outcome: dict[str, str], out: Path) -> str:
    """The summary: the verdict of each phase, a line per result row, and why it failed."""
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
    "mfu_nanochat", "passes_ms", "optimizer_ms", "memory_gb", "first_step_s",
    "share_of_bandwidth", "note",
)  # fmt: skip


def short(row: dict) -> str:
    values = [f"{name} {results.shown(row[name])}" for name in SHOWN if row.get(name) is not None]
    return f"   {row['case']} | {row['provider']} | {', '.join(values)}"


def pack(out: Path, page: str) -> None:
    """Write the summary, and pack the folder into one file beside it."""
    files.write(out / "summary.txt", page + "\n")
    part = out.parent / f".{out.name}.tar.gz.part"
    with tarfile.open(part, "w:gz", compresslevel=3) as archive:
        archive.add(out, out.name)
    part.replace(out.parent / f"{out.name}.tar.gz")


def main(config: SuiteConfig) -> int:
    """`hotlap bench look`, `check` and `figures`."""
    return run_suite(config)


if __name__ == "__main__":
    set_up_logging()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    raise SystemExit(guarded(lambda: main(suite_flags(*arguments)), debug="--debug" in sys.argv))

"""`--profile`: a trace of a few steps, and on a GPU a memory snapshot, in the run's directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hotlap.common.log import log
from hotlap.train.distributed.world import World

WAIT, WARMUP, ACTIVE = 3, 1, 3  # steps


@contextmanager
def profiled(run: Path | None, world: World) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step. Writes run/profile/trace-rank-R.json for ui.perfetto.dev,
    and on a GPU memory-rank-R.pickle for pytorch.org/memory_viz. run: None disables profiling.
    """
    if run is None:
        yield lambda: None
        return
    folder = run / "profile"
    folder.mkdir(exist_ok=True)
    on_gpu = world.device.type == "cuda"

    def write(profiler: profile) -> None:
        trace = folder / f"trace-rank-{world.rank}.json"
        profiler.export_chrome_trace(str(trace))
        log.info("%s: open it in https://ui.perfetto.dev", trace)
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank-{world.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step

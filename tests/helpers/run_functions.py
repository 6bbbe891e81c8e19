"""Small pretraining and fine-tuning runs on several ranks, and their results."""

import dataclasses
import hashlib
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers.small_runs import small_run, write_conversations
from safetensors import safe_open

from hotlap.cli import main
from hotlap.common.log import log
from hotlap.model.weights import run_checkpoints
from hotlap.train.data import public
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.muon_adamw import OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import read_metrics
from hotlap.train.sft import SFTConfig, fine_tune
from hotlap.train.speedruns import track

SCHEDULE = ScheduleConfig(warmup_steps=10)
STAGES = ScheduleConfig(warmup_steps=10, stages=((1 / 3, 0.5), (2 / 3, 0.5), (1.0, 1.0)))
# At real learning rates a model this narrow is chaotic: rounding errors grow tenfold in two steps.
GENTLE = OptimConfig(matrix_lr=0.005, embedding_lr=0.03, head_lr=0.001, scalar_lr=0.05)


def pretraining(folder: str, name: str, timeout: float = 30, steps: int = 10, **fields) -> list[str]:
    """Pretrain with 12 rows per step, saving every 4 steps. Returns this rank's log messages."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    config = small_run(
        Path(folder), batch_rows=12, loop=LoopConfig(steps, evaluate_every=steps, save_every=4),
        schedule=SCHEDULE, optim=GENTLE,
    )  # fmt: skip
    loop = dataclasses.replace(config.loop, **fields.pop("loop", {}))
    with joined(timeout):
        pretrain(dataclasses.replace(config, out=Path(folder) / name, loop=loop, **fields))
    return said


def command(folder: str, *words: str) -> None:
    """`hotlap WORDS` in a folder."""
    os.chdir(folder)
    assert main(list(words)) == 0


def validating(folder: str) -> dict:
    """The validation of the newest checkpoint of the run `pretrain`."""
    config = small_run(Path(folder), out=Path(folder) / "pretrain", loop=LoopConfig(6, 6, 6), eval_only=True)
    with joined(30):
        return pretrain(config)


def fine_tuning(folder: str, name: str, base: str, steps: int = 20, **fields) -> None:
    """Fine-tune with 12 ragged rows per step, of which few targets have loss."""
    config = SFTConfig(
        out=Path(folder) / name, base=Path(folder) / base, batch_rows=12, dtype="float32",
        data=str(write_conversations(Path(folder) / f"{name}.jsonl", 100)), compile="off",
        schedule=SCHEDULE, optim=GENTLE, loop=LoopConfig(steps, steps, steps),
    )  # fmt: skip
    with joined(30):
        fine_tune(dataclasses.replace(config, **fields))


def racing(folder: str, name: str) -> dict:
    """Run the main track with a model of one layer on a local shard, and return this rank's result."""
    data = Path(folder) / "shards"
    recipe = dataclasses.replace(
        small_run(Path(folder), batch_rows=12, data=str(data), loop=LoopConfig(6, 3, 6)), schedule=STAGES
    )
    track.gpt2_124m = lambda: recipe
    public.fineweb, public.download_plan = lambda *_: None, lambda *_: SimpleNamespace(missing={})
    config = track.TrackConfig(Path(folder) / name, data, micro_batch="1", dtype="float32", yes=True)
    return track.track_speedrun(config)


def metrics(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


def losses(run: Path) -> list[str]:
    """Bit for bit."""
    return [float(line["loss"]).hex() for line in metrics(run)]


def state_of(run: Path) -> dict[str, str]:
    """sha256 of each rank's shard of each tensor in the newest checkpoint."""
    found = {}
    newest = run_checkpoints(run)[-1]
    for path in newest.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                digest = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
                found[f"{path.relative_to(newest)} {name}"] = digest
    return found


def soak(folder: str, name: str, steps: int) -> list[tuple[int, int]]:
    """Resident bytes and open files of the process at each evaluation of a pretraining."""
    seen = []

    def look(*_) -> dict:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        return {"validation_loss": 0.0, "validation_bpb": 0.0}

    from hotlap.train import pretrain as module

    module.validation = look
    torch.set_num_threads(1)
    pretraining(folder, name, steps=steps, loop={"evaluate_every": steps // 10, "save_every": steps // 10})
    return seen


def stop_at_pass(monkeypatch, module, name: str, number: int) -> None:
    """Make training stop after n passes of a loss, module.name(model, batch, config), as if it had been
    killed.
    """
    passes, real = iter(range(number)), getattr(module, name)

    def loss(model, batch, config):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return real(model, batch, config)

    monkeypatch.setattr(module, name, loss)

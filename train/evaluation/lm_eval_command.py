"""`hotlap lm-eval`: the tasks of EleutherAI's lm-eval, or one's own in its format."""

from __future__ import annotations

import difflib
import importlib.util
import json
import time
from typing import TYPE_CHECKING

from hotlap.common.files import write
from hotlap.common.machine import circumstances
from hotlap.common.terminal import printable
from hotlap.model.weights import open_model, stage
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.config import WAIT, LmEvalConfig, check_out
from hotlap.train.evaluation.questions import load_engine

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LIST = "`lm_eval ls tasks` lists lm-eval's, and --include-path adds your own"
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "configs", "samples")  # of lm-eval's result


def check(config: LmEvalConfig) -> None:
    """Raise what is wrong with the config itself."""
    config.validate()
    if not config.tasks:
        raise ValueError(f"no --tasks; {LIST}")
    if config.include_path and not config.include_path.is_dir():
        raise FileNotFoundError(
            f"no folder {config.include_path}; --include-path takes one with tasks in YAML"
        )
    check_out(config.out)
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("its tasks need the package lm-eval: pip install 'hotlap[eval]'")


def task_manager(config: LmEvalConfig) -> TaskManager:
    """lm-eval's list of tasks. Its own thousands, which take seconds to read, only if --include-path does not
    have all that are asked for. ValueError for an unknown one.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.include_path, include_defaults=False)
    if not {*config.tasks} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=config.include_path)
    for task in (task for task in config.tasks if task not in manager.all_tasks):
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else LIST
        raise ValueError(f"unknown lm-eval task: {task!r}; {hint}")
    return manager


def evaluate_model(config: LmEvalConfig) -> dict:
    """Evaluate the model. Prints lm-eval's table, then writes to config.out and returns its results, with the
    device, versions and date. All ranks share the work; rank 0 alone has the results.
    """
    began = time.perf_counter()
    check(config)
    folder, _, _ = open_model(config.model)
    trained_for = stage(folder)
    if config.chat and trained_for == "pretrain":
        raise ValueError(f"{config.model} is a base model, which cannot chat; leave out --chat")
    manager = task_manager(config)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    from hotlap.train.evaluation.lm_eval import HotlapLM

    with joined(WAIT) as world:
        engine = load_engine(folder, world.device)
        found = simple_evaluate(
            HotlapLM(engine, world, config.chat), tasks=list(config.tasks), num_fewshot=config.num_fewshot,
            limit=config.limit or None, task_manager=manager, apply_chat_template=config.chat,
        )  # fmt: skip
        if not world.is_main:
            return {}
        result = {
            "model": str(config.model), "folder": str(folder), "stage": trained_for, "chat": config.chat,
            **circumstances(engine.device), "dtype": str(engine.model.compute_dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - began, 1), "ranks": world.size,
        } | {name: found[name] for name in KEPT if name in found}  # fmt: skip
        tables = [make_table(found)] + ([make_table(found, "groups")] if found.get("groups") else [])
        text = "\n\n".join([f"{folder} on {result['device']}, {result['dtype']}", *tables])
        print(printable(text), flush=True)  # before the disk turns out to be full
        if config.out:
            write(config.out, json.dumps(result, indent=1, default=handle_non_serializable) + "\n")
    return result


def main(config: LmEvalConfig) -> None:
    """`hotlap lm-eval`."""
    evaluate_model(config)

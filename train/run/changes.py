"""What may differ between a run, or a checkpoint, and the configuration that goes on from it.

A run in its own folder may change its length and what does not affect training. In a new folder it may also
change what a checkpoint's state does not depend on, such as learning rates. Model, tokenizer, data and their
order must be the same everywhere: they are what the state means.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.options import differences, flat, to_json
from hotlap.model.manifest import MANIFEST, read_manifest
from hotlap.train.run.state import RunState

# Where and how a run is computed, watched and saved.
FREE = {
    "resume", "compile", "out", "micro_batch", "recompute", "profile", "tracker",
    "loop.evaluate_every", "loop.save_every", "loop.bad_steps", "validation_questions",
}  # fmt: skip
LENGTH = {"loop.steps", "loop.minutes", "epochs", "most_epochs"}
ADAPTERS = {"lora_rank", "lora_alpha"}  # what a checkpoint's weights are
ORDER = {"seed"}  # of the data: a position in one order is none in another
# Compared by content, wherever the user keeps it: the model by its shape, the others by their hashes.
BY_CONTENT = ("data", "tokenizer", "base", "model.")


def changes(saved: dict, config: Any) -> dict[str, str]:
    """`field: saved X, current Y`, by field, but for FREE ones. Fields newer than `saved` had the default,
    and one that is a list now may have been a string, its only item.
    """
    old = flat(json.loads(to_json(type(config)()))) | flat(saved)
    new = flat(json.loads(to_json(config)))
    old |= {k: [v] for k, v in old.items() if isinstance(v, str) and isinstance(new.get(k), list)}
    return {
        name: differences({name: old.get(name)}, {name: new.get(name)})[0]
        for name in sorted({*old, *new} - FREE)
        if old.get(name) != new.get(name)
    }


def check_origin(folder: Path, config: Any) -> None:
    """Raise what can be known before data is prepared: whether a folder of --resume is a checkpoint, of the
    same order of the data.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is a model without the state of its training; --resume needs a checkpoint")
    if saved := read_manifest(folder).get("run"):
        check_order(folder, changes(saved, config))


def continued(folder: Path, manifest: dict, state: RunState, config: Any, stage: Any) -> RunState:
    """The state with which a run goes on from a checkpoint that another configuration may have saved.

    config, stage: the run's StageConfig and Stage. Logs what differs, and what starts anew because of that.
    ValueError if the checkpoint is of another stage, data or order of the data, or if the run would already
    be over.
    """
    saved = manifest.get("run")
    if saved is None:
        log.warning(
            "%s does not say how it was configured; only model, tokenizer and data are compared", folder
        )
    found = {} if saved is None else changes(saved, config)
    found = {name: text for name, text in found.items() if not name.startswith(BY_CONTENT)}
    check_data(folder, state, found, stage)
    steps_flag = "--loop.steps" + (" and --loop.minutes 0" if stage.loop.minutes else "")
    same_time = bool(stage.loop.minutes) and saved is not None and not LENGTH & set(found)
    if state.finished and (state.step == stage.loop.steps or same_time):
        flag = steps_flag if state.step == stage.loop.steps else "--loop.minutes"
        log.info("%s: finished after step %d; to train on, give a higher %s", folder, state.step, flag)
        return state
    over = bool(stage.loop.minutes) and state.seconds >= 60 * stage.loop.minutes
    if state.step >= stage.loop.steps or over:
        length = f"{stage.loop.minutes:g} minutes" if over else f"{stage.loop.steps} steps"
        raise ValueError(
            f"{folder} has taken {state.step} steps in {state.seconds / 60:.3g} minutes, and this run ends "
            f"after {length}; give a higher {'--loop.minutes' if over else steps_flag}, or resume from an "
            "earlier checkpoint into another --out"
        )
    state = dataclasses.replace(state, finished=False)
    if not found:
        return state
    log.info("%s: going on with %s; spikes are measured anew", folder, "; ".join(found.values()))
    if LENGTH & set(found):
        log.info(
            "the schedule follows the new length, so the learning rate may go up again: the last step had "
            "%.3g of its peak", state.last.get("lr_share", 1.0),
        )  # fmt: skip
    return dataclasses.replace(state, recent=RunState().recent)  # other rates and batches have other losses


def check_data(folder: Path, state: RunState, found: dict[str, str], stage: Any) -> None:
    """Raise ValueError if a checkpoint is of another stage or data, or of another order of the data.

    found: what has changed, by field.
    """
    if state.stage != stage.name:
        use = {"sft": "to fine-tune it", "dpo": "to start from it", "rl": "to start from it"}.get(stage.name)
        hint = f"; {use}, give --base {folder}" if use else ""
        raise ValueError(f"{folder} is a checkpoint of {state.stage}, which {stage.name} cannot resume{hint}")
    if state.data != stage.data:
        raise ValueError(
            f"{folder} was started on other data than {stage.source} holds now; restore that data, or start "
            "a new run with another --out"
        )
    check_order(folder, found)
    if other := [text for name, text in found.items() if name in ADAPTERS]:
        raise ValueError(
            f"{folder} has other adapters: {'; '.join(other)}; restore the original value, or start "
            f"a new run with --base {folder}"
        )


def check_order(folder: Path, found: dict[str, str]) -> None:
    if other := [text for name, text in found.items() if name in ORDER]:
        raise ValueError(
            f"{folder} has another order of the data: {'; '.join(other)}; restore the original value, or "
            "start a new run"
        )

"""The reference's log-probabilities, which DPO compares the model with: computed once, and kept in the run.

They come from the model that is about to be trained, while it still has the weights of the base, in the same
batches: so the first step finds exactly what the model itself gives.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hotlap.common.errors import DataError
from hotlap.common.files import replacing
from hotlap.common.log import log
from hotlap.model.transformer import Transformer
from hotlap.train.data.preference_rows import PairRows, PairTokens
from hotlap.train.data.preferences import SIDES
from hotlap.train.distributed.sharding import sharded_modules
from hotlap.train.distributed.world import World
from hotlap.train.preference_losses import log_probabilities

REFERENCE = "reference.npz"  # a .safetensors would make the run a model


def fill_reference(
    model: Transformer,
    rows: dict[str, PairRows],
    micro_rows: int,
    run: Path,
    facts: dict[str, str],
    world: World,
) -> None:
    """Fill the reference of all pairs, from the run's file if it has it, else from the model, which must have
    the weights of the base; collective.

    rows: of each split, over the same tokens. facts: what the numbers depend on; `base` is the hash of the
    base's weights. ValueError if the run began from others.
    """
    tokens = rows["train"].tokens
    if world.together(lambda: read_reference(run / REFERENCE, tokens, facts))[0]:
        return
    for split in rows:
        compute_reference(model, rows[split], micro_rows, world, f"{run.name}: reference, {split}")
    for module in sharded_modules(model):  # as without this: nothing of the base stays gathered
        module.reshard()
    if world.size > 1:
        dist.all_reduce(torch.from_numpy(tokens.reference))  # each rank has 0 where another has computed
    check_finite(tokens)
    world.together(lambda: write_reference(run / REFERENCE, tokens, facts) if world.is_main else None)


def compute_reference(model: Transformer, rows: PairRows, micro_rows: int, world: World, name: str) -> None:
    """This rank's part of the first epoch, in the micro-batches of training."""
    from tqdm import tqdm

    starts = range(0, rows.epoch_rows(), micro_rows * world.size)
    for start in tqdm(starts, name, unit="batch", disable=None if world.is_main else True, leave=False):
        first = start + world.rank * micro_rows
        batch = rows.batch(first, micro_rows)
        with torch.enable_grad():  # which may choose other kernels than inference
            found = log_probabilities(model, batch.to(world.device)).detach()
        rows.keep_reference(first, found.cpu().numpy())


def check_finite(tokens: PairTokens) -> None:
    """Raise FloatingPointError, naming pair and token, if the reference is not finite."""
    wrong = np.flatnonzero(~np.isfinite(tokens.reference))
    if not len(wrong):
        return
    document = int(np.searchsorted(tokens.stops.flatten(), wrong[0], side="right"))
    number, side = divmod(document, 2)
    token = f"token {wrong[0] - tokens.starts[number, side]} (id {tokens.ids[wrong[0]]})"
    raise FloatingPointError(
        f"step 0: the base gives {token} of the {SIDES[side]} side of {tokens.places[number]} the "
        f"log-probability {tokens.reference[wrong[0]]}; "
        "the model is damaged, or its numbers overflow: try --dtype float32, or another --base"
    )


def write_reference(path: Path, tokens: PairTokens, facts: dict[str, str]) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, reference=tokens.reference, facts=json.dumps(facts))


def read_reference(path: Path, tokens: PairTokens, facts: dict[str, str]) -> bool:
    """Read a run's reference if it has one that fits. ValueError if it is of another base."""
    if not path.exists():
        return False
    try:
        with np.load(path) as file:  # which unpickles nothing
            saved, found = json.loads(str(file["facts"])), file["reference"]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        log.warning("%s is damaged; computing it again from the base", path)
        return False
    if saved.get("base", facts["base"]) != facts["base"]:
        raise DataError(
            f"{path} is of another base: the weights that --base names have changed since this run began; "
            "restore them, or start a new run with another --out"
        )
    if saved != facts or found.shape != tokens.reference.shape or found.dtype != tokens.reference.dtype:
        changed = [name for name in facts if saved.get(name) != facts[name]]
        log.info("%s: another %s; computing it again from the base", path, ", ".join(changed) or "size")
        return False
    tokens.reference[:] = found
    return True

"""Direct preference optimization: a chat model learns which of two answers is preferred."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterator

import torch

from hotlap.common.files import write
from hotlap.common.log import log
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.adapter_files import weights_sha256
from hotlap.model.transformer import Transformer
from hotlap.model.weights import TOKENIZER, lineage, model_folder
from hotlap.train.config import DPOConfig
from hotlap.train.data.preference_rows import PairRows, PairTokens, pair_digests, pair_rows
from hotlap.train.data.preferences import SAMPLED, Pair, check_data, download_pairs, pairs_of
from hotlap.train.distributed.world import World, joined
from hotlap.train.losses import Loss
from hotlap.train.preference_losses import preference_loss
from hotlap.train.reference import fill_reference
from hotlap.train.run.folder import origin, run_of
from hotlap.train.sampled_pairs import SAMPLES, read_samples, sample_pairs
from hotlap.train.sft import check_tokenizer, epoch_steps, open_chat_model, passes
from hotlap.train.stage import Stage, check_machine, closing, evaluated_aside, opened, row_batches, train


def optimize_preferences(config: DPOConfig) -> dict[str, float]:
    """Train on all ranks, and return the last metrics."""
    config = config.validate()
    check_data(config.data)
    with joined() as world, evaluated_aside(config, world) as config:
        base, shape, tokenizer = open_chat_model(config)
        check_machine(config, world, shape)
        with world.main_first("download the pairs"):
            if world.is_main:
                download_pairs(config.data)

        def prepare() -> tuple[PairTokens, dict[str, PairRows]]:
            """Everything that is read, so that its errors show before anything is sampled or trained."""
            check_tokenizer(config.out / TOKENIZER, tokenizer)
            pairs = all_pairs(config, world)
            return pair_rows(pairs, tokenizer, shape.context, config.seed)

        with opened(config, world, prepare) as (tokens, rows):
            digests = {split: pair_digests(tokens, rows[split].numbers) for split in rows}
            trained = set(digests["train"])
            if same := sum(digest in trained for digest in digests["validation"]):
                log.info("%d of the pairs to validate are trained on, too", same)
            data = hashlib.sha256(b"".join(digests["train"])).hexdigest()
            steps = max(config.loop.steps, epoch_steps(config, rows["train"]))
            loss = preference_loss(config)
            facts = {
                "base": world.together(lambda: weights_sha256(lineage(base)) if world.is_main else "")[0],
                "data": hashlib.sha256(b"".join(digests["train"] + digests["validation"])).hexdigest(),
                "dtype": config.dtype, "context": str(shape.context),
            }  # fmt: skip
            last = train(
                config,
                Stage(
                    "dpo", shape, tokenizer, loss,
                    batches=row_batches(rows["train"], config, steps, world),
                    evaluate=lambda model, at_once: held_out(model, rows["validation"], loss, at_once, world),
                    data=data, source=", ".join(config.data),
                    about=f"{len(digests['train'])} pairs in {rows['train'].epoch_rows()} rows, "
                    f"{passes(config, rows['train'], steps)}, {len(digests['validation'])} to validate",
                    loop=dataclasses.replace(config.loop, steps=steps), base=base,
                    prepare=lambda model, at_once: fill_reference(
                        model, rows, at_once, config.out, facts, world
                    ),
                ),
                world,
            )  # fmt: skip
    if not config.eval_only:
        warn_of_failure(last, config)
    return last


def warn_of_failure(last: dict[str, float], config: DPOConfig) -> None:
    """Warn of what often goes wrong though the loss falls. last: metrics, also of the held-out pairs."""
    margin, chosen = (last.get(f"validation_{name}", 0.0) for name in ("margin", "chosen_reward"))
    if margin < 0 or last.get("validation_accuracy", 1.0) <= 0.5:
        log.warning(
            "the held-out pairs are not preferred as they should be (margin %.3g): try more pairs, more "
            "--epochs, or higher --optim rates, and see whether some pairs are the wrong way round",
            margin,
        )  # fmt: skip
    if chosen < 0:
        log.warning(
            "the chosen answers of the held-out pairs have become less likely than they were for the base "
            "(reward %.3g), so what the model says instead may be neither answer; try a higher --sft-weight "
            "than %g, or lower --optim rates",
            chosen, config.sft_weight,
        )  # fmt: skip


def all_pairs(config: DPOConfig, world: World) -> Iterator[Pair]:
    """The pairs of all that `data` names. What the base is to be asked for is sampled last, by rank 0, unless
    the run that is gone on from in a new folder has it.
    """
    for name in config.data:
        if name != SAMPLED:
            yield from pairs_of(name)
    if SAMPLED in config.data:
        path = config.out / SAMPLES
        if world.is_main and not path.exists():
            start = origin(config.out, config.resume)
            if start not in ("no", "auto") and (earlier := run_of(model_folder(start)) / SAMPLES).exists():
                write(path, earlier.read_text(encoding="utf-8"))
            else:
                sample_pairs(config.base, path, config.seed, world.device)
        yield from read_samples(path)


@torch.no_grad()
def held_out(model: Transformer, rows: PairRows, loss: Loss, at_once: int, world: World) -> dict[str, float]:
    """The loss and its metrics over the held-out pairs, divided among the ranks; collective."""
    sums: dict[str, float] = {}
    weight, total = 0, rows.epoch_rows()
    for start in range(0, total, at_once * world.size):
        first = start + world.rank * at_once
        batch = rows.batch(first, at_once)
        beyond = max(0, total - first)  # rows that the sequence repeats
        for tensor, nothing in ((batch.targets, IGNORE), (batch.pair, -1), (batch.numbers, -1)):
            tensor[beyond:] = nothing
        value, metrics = loss(model, batch.to(world.device))
        weight += int((batch.numbers >= 0).sum())
        for name, found in {"loss": value, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + found.item()
    *totals, count = world.total(*sums.values(), weight)
    return {f"validation_{name}": total / count for name, total in zip(sums, totals, strict=True)}


def main(config: DPOConfig) -> None:
    """`hotlap dpo`."""
    last = optimize_preferences(config)
    print(closing(config, last, f"chat with it: python chat.py {shlex.quote(str(config.out))}"))

"""Direct preference optimization: a chat model learns which of two answers is preferred."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterator

import torch

from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.adapter_files import weights_sha256
from hotlap.model.gpt import GPT
from hotlap.model.weights import TOKENIZER, lineage, open_model, stage
from hotlap.train.config import DPOConfig
from hotlap.train.data.preference_rows import PairRows, PairTokens, pair_digests, pair_rows
from hotlap.train.data.preferences import SAMPLED, Pair, download_pairs, pairs_of
from hotlap.train.distributed.world import World, joined
from hotlap.train.losses import Loss
from hotlap.train.optim.schedule import rows_in_all
from hotlap.train.preference_losses import preference_loss
from hotlap.train.reference import fill_reference
from hotlap.train.sampled_pairs import SAMPLES, read_samples, sample_pairs
from hotlap.train.sft import check_tokenizer, epoch_steps
from hotlap.train.stage import Stage, check_machine, opened, row_batches, train


def optimize_preferences(config: DPOConfig) -> dict[str, float]:
    """Train on all ranks, and return the last metrics."""
    config = config.validate()
    with joined() as world:
        base, shape, tokenizer = open_model(config.base)
        if stage(base) == "pretrain":
            raise ValueError(
                f"--base {config.base} is a base model, which does not converse; fine-tune it with `hotlap "
                "sft`"
            )
        check_machine(config, world, shape)
        with world.main_first(f"download {config.data}"):
            if world.is_main:
                download_pairs(config.data)

        def prepare() -> tuple[PairTokens, dict[str, PairRows]]:
            """Everything that is read, so that its errors show before anything is sampled or trained."""
            check_tokenizer(config.out / TOKENIZER, tokenizer)
            pairs = all_pairs(config, world)
            return pair_rows(pairs, tokenizer, shape.context, config.seed)

        with opened(config, world, prepare) as (tokens, rows):
            digests = {split: pair_digests(tokens, rows[split].numbers) for split in rows}
            if same := len(set(digests["train"]) & set(digests["validation"])):
                log.info("%d pairs are in both the training and the validation split", same)
            data = hashlib.sha256(b"".join(digests["train"])).hexdigest()
            steps = max(config.loop.steps, epoch_steps(config, rows["train"]))
            epochs = rows_in_all(config.schedule, config.batch_rows, steps) / rows["train"].epoch_rows()
            loss = preference_loss(config)
            facts = {
                "base": world.together(lambda: weights_sha256(lineage(base)) if world.is_main else "")[0],
                "data": hashlib.sha256(b"".join(digests["train"] + digests["validation"])).hexdigest(),
                "dtype": config.dtype, "context": str(shape.context),
            }  # fmt: skip
            return train(
                config,
                Stage(
                    "dpo", shape, tokenizer, loss,
                    batches=row_batches(rows["train"], config, steps, world),
                    evaluate=lambda model, at_once: held_out(model, rows["validation"], loss, at_once, world),
                    data=data, source=", ".join(config.data),
                    about=f"{len(digests['train'])} pairs in {rows['train'].epoch_rows()} rows, {epochs:.1f} "
                    f"epochs, {len(digests['validation'])} to validate",
                    loop=dataclasses.replace(config.loop, steps=steps), base=base,
                    prepare=lambda model, at_once: fill_reference(
                        model, rows, at_once, config.out, facts, world
                    ),
                ),
                world,
            )  # fmt: skip


def all_pairs(config: DPOConfig, world: World) -> Iterator[Pair]:
    """The pairs of all that `data` names. What the base is to be asked for is sampled last, by rank 0."""
    for name in config.data:
        if name != SAMPLED:
            yield from pairs_of(name)
    if SAMPLED in config.data:
        if world.is_main and not (config.out / SAMPLES).exists():
            sample_pairs(config.base, config.out / SAMPLES, config.seed, world.device)
        yield from read_samples(config.out / SAMPLES)


@torch.no_grad()
def held_out(model: GPT, rows: PairRows, loss: Loss, at_once: int, world: World) -> dict[str, float]:
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
    optimize_preferences(config)
    print(printable(f"chat with it: python chat.py {shlex.quote(str(config.out))}"))

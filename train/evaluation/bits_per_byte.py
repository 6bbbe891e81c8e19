"""Loss and bits per byte on held-out text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from hotlap.common.gpu import widest
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.model.weights import TOKENIZER
from hotlap.train.data.rows import PackedRows, packed_rows, validation_batches
from hotlap.train.data.shards import documents_in, encoded
from hotlap.train.data.sources import documents_of, shard_folder
from hotlap.train.distributed.world import World

BATCH_TOKENS = 16_384  # per forward pass


@torch.no_grad()
def validation(
    model: Transformer, rows: PackedRows, tokenizer: Tokenizer, batch_rows: int, world: World
) -> dict[str, float]:
    """validation_loss in nats per token, and validation_bpb in bits per byte of text, without special tokens.

    Over all rows, divided among the ranks; collective.
    """
    device = world.device
    sizes = torch.zeros(model.config.vocab_size, device=device)
    sizes[: tokenizer.vocab_size] = torch.tensor(tokenizer.byte_counts(), dtype=torch.float32)
    sums = torch.zeros(4, dtype=widest(device), device=device)  # nats, tokens, nats of text, bytes of text
    for batch in validation_batches(rows, batch_rows, world.rank, world.size):
        batch = batch.to(device)
        losses = model(batch.inputs, batch.targets, reduction="none", document_start=batch.document_start).to(
            sums.dtype
        )
        targets = batch.targets.flatten()
        carries = targets != IGNORE
        size = sizes[targets.clamp(min=0)] * carries
        sums += torch.stack((losses.sum(), carries.sum(), (losses * (size > 0)).sum(), size.sum()))
    nats, count, text_nats, text_bytes = world.total(*sums.tolist())
    if not math.isfinite(nats):
        raise FloatingPointError("the validation loss is not finite; the model has diverged or is damaged")
    return {"validation_loss": nats / count, "validation_bpb": text_nats / text_bytes / math.log(2)}


def held_out_rows(source: str | Path, tokenizer: Tokenizer, context: int, limit: int) -> PackedRows:
    """The validation split that pretraining on this source would use, or its first `limit` tokens."""
    if folder := shard_folder(str(source)):
        beside = folder / TOKENIZER
        if beside.is_file() and Tokenizer.load(beside).sha256 != tokenizer.sha256:
            raise ValueError(f"the shards in {folder} were made with another tokenizer than the model's")
        return packed_rows(folder, "validation", tokenizer, context, limit=limit)
    tokens = np.concatenate(list(encoded(documents_of("validation", str(source)), tokenizer)))
    documents = documents_in(tokens, tokenizer.bos, limit)
    return PackedRows([lambda: documents], context, 0, shuffle=False)


def bits_per_byte(model: Transformer, rows: PackedRows, tokenizer: Tokenizer, world: World) -> dict:
    """Loss and bits per byte, with the number of rows and their length."""
    batch_rows = max(1, BATCH_TOKENS // model.config.context)
    scores = validation(model, rows, tokenizer, batch_rows, world)
    return {
        "bpb": scores["validation_bpb"], "loss": scores["validation_loss"],
        "rows": rows.epoch_rows(), "context": model.config.context,
    }  # fmt: skip

"""What the config.json of any model of Transformers has in common, and refusals of what is not ours in one.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotlap.common.errors import DataError

OURS = "hotlap"  # an object in config.json with what only we need; Transformers keeps it
# Fields that change nothing about what a trained model computes, or that the weights show.
HARMLESS = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "return_dict", "output_hidden_states",
    "output_attentions", "id2label", "label2id", "chunk_size_feed_forward", OURS,
}  # fmt: skip


def check_sizes(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise DataError for a size that is no whole number from 1."""
    for name in names:
        if type(fields.get(name)) is not int or fields[name] < 1:
            raise DataError(f"{name}={shown(fields.get(name))} must be a whole number from 1")


def check_fields(fields: Mapping[str, Any], held: dict[str, tuple], known: set[str]) -> None:
    """Raise DataError for a field that asks for what our models do not compute.

    held: the values that a field may have; the first is what Transformers takes for one that is not there.
    known: fields that may have any value. Of all others, those that are set are refused.
    """
    for name, values in held.items():
        if fields.get(name, values[0]) not in values:
            raise DataError(f"{name}={shown(fields[name])} is not supported; it must be {values[0]}")
    for name, value in fields.items():
        if name not in HARMLESS | known | {*held} and value:
            raise DataError(f"{name}={shown(value)} is not supported; our models have nothing like it")


def shown(value: object) -> str:
    return f"{value!r:.40}"

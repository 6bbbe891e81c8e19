"""A ladder: one recipe at several depths, each trained in proportion to its size.

The rules are those of `from_depth`, from any recipe instead of nanochat's: width grows with the depth, the
batch with tokens^0.383, learning rates with the square root of the batch, and weight decay falls as runs get
longer. So a recipe that was tried at one depth says what it is at all of them.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from hotlap.train.config import PretrainConfig
from hotlap.train.optim.schedule import rows_in_all
from hotlap.train.presets import BATCH_EXPONENT, RATES, matmul_parameters

COARSEST = 8  # a batch is at least so many of what it is rounded to


def tokens_per_parameter(recipe: PretrainConfig) -> float:
    """Training tokens per matmul parameter."""
    return recipe.tokens / matmul_parameters(recipe.model)


def rung(recipe: PretrainConfig, share: Fraction, ratio: float) -> PretrainConfig:
    """The recipe with `share` of its layers, rounded, and as much of its width, rounded up to whole heads.

    ratio: training tokens per matmul parameter. ValueError if that is not even one step.
    """
    shape = recipe.model
    kv_heads = math.ceil(shape.kv_heads * share)
    heads = kv_heads * (shape.heads // shape.kv_heads)
    model = dataclasses.replace(
        shape, layers=max(1, round(shape.layers * share)), width=heads * shape.head_dim, heads=heads,
        kv_heads=kv_heads,
    )  # fmt: skip
    growth = matmul_parameters(model) / matmul_parameters(shape)
    rows = batch_near(recipe.batch_rows * growth**BATCH_EXPONENT, recipe)
    faster = (rows / recipe.batch_rows) ** 0.5
    optim = dataclasses.replace(
        recipe.optim, **{name: faster * getattr(recipe.optim, name) for name in RATES},
        weight_decay=recipe.optim.weight_decay * faster / growth,
    )  # fmt: skip
    cycle = len(recipe.schedule.stages)
    step = rows_in_all(recipe.schedule, rows, cycle) / cycle * model.context
    steps = round(ratio * matmul_parameters(model) / step)
    if steps < cycle:
        raise ValueError(
            f"ratio={ratio:g} gives {steps} steps with {model.layers} layers; give a higher one, or leave "
            "out that depth"
        )
    return dataclasses.replace(
        recipe, model=model, batch_rows=rows, optim=optim, loop=dataclasses.replace(recipe.loop, steps=steps),
        micro_batch="auto" if recipe.micro_batch.isdigit() else recipe.micro_batch,
    )  # fmt: skip


def batch_near(wanted: float, recipe: PretrainConfig) -> int:
    """Rows of a step, within 6 % of what is wanted or one row for each part of a stage, so that ranks and
    stages can share them as they share the recipe's: its powers of two are kept as far as that allows.
    """
    shares = (Fraction(rows).limit_denominator(64) for rows, _ in recipe.schedule.stages)
    parts = math.lcm(*(share.denominator for share in shares))
    unit = 1
    while recipe.batch_rows % (2 * unit * parts) == 0 and 2 * unit * parts * COARSEST <= wanted:
        unit *= 2
    return unit * parts * max(1, round(wanted / (unit * parts)))

"""A recipe at other depths."""

import dataclasses
from fractions import Fraction

import pytest

from hotlap.train.presets import from_depth, matmul_parameters, tiny
from hotlap.train.studies.ladder import rung, tokens_per_parameter


def at(depth: int, recipe=None, ratio: float = 0):
    recipe = recipe or tiny()
    return rung(recipe, Fraction(depth, recipe.model.layers), ratio or tokens_per_parameter(recipe))


def test_at_its_own_depth_a_recipe_is_itself():
    assert at(4) == tiny()
    assert dataclasses.replace(at(12, from_depth(12)), micro_batch="32") == from_depth(12)


@pytest.mark.parametrize("depth", [6, 9, 16, 24])
def test_the_rules_are_those_of_from_depth(depth):
    """But for the batch, which these round to a power of two."""
    ours, theirs = at(depth, from_depth(12)), from_depth(depth)
    assert ours.model == theirs.model and ours.tokens == pytest.approx(theirs.tokens, rel=0.01)
    assert 0.7 < ours.batch_rows / theirs.batch_rows < 1.42
    share = (ours.batch_rows / theirs.batch_rows) ** 0.5
    for name in ("matrix_lr", "embedding_lr", "scalar_lr", "weight_decay"):
        assert getattr(ours.optim, name) == pytest.approx(share * getattr(theirs.optim, name))


def test_what_a_recipe_changes_is_changed_at_all_depths():
    recipe = tiny()
    optim = dataclasses.replace(recipe.optim, matrix_lr=recipe.optim.matrix_lr / 10)
    changed = dataclasses.replace(recipe, batch_rows=64, optim=optim)
    for depth in (2, 5, 8):
        one, other = at(depth), at(depth, changed, tokens_per_parameter(recipe))
        assert other.batch_rows == pytest.approx(4 * one.batch_rows, rel=0.1)
        assert other.optim.matrix_lr == pytest.approx(one.optim.matrix_lr / 10, rel=0.05)
        assert other.tokens == pytest.approx(one.tokens, rel=0.05)
    deeper = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layers=6))
    assert rung(deeper, Fraction(2, 4), 1).model.layers == 3


def test_tokens_follow_the_ratio_also_in_stages():
    stages = dataclasses.replace(tiny().schedule, stages=((0.25, 1.0), (0.5, 1.0), (1.0, 1.0)))
    for depth in (3, 5, 6):
        run = at(depth, dataclasses.replace(tiny(), schedule=stages), 1.0)
        assert run.tokens == pytest.approx(matmul_parameters(run.model), rel=0.02)
        assert run.batch_rows % 4 == 0


def test_ranks_can_share_a_batch_at_all_depths_of_a_large_recipe():
    assert not [d for d in range(4, 31) if at(d, from_depth(12)).batch_rows % 8]
    odd = dataclasses.replace(tiny(), batch_rows=18)
    assert at(4, odd).batch_rows == 18


def test_heads_stay_whole_and_share_keys_as_before():
    grouped = dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, heads=6, kv_heads=3))
    model = at(3, grouped).model
    assert (model.heads, model.kv_heads, model.head_dim) == (6, 3, 32)
    with pytest.raises(ValueError, match="ratio=1e-06 gives 0 steps with 2 layers"):
        at(2, ratio=1e-6)

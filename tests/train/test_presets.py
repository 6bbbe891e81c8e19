"""Presets."""

import dataclasses

import pytest

from hotlap.model.stock import stock_class
from hotlap.model.tokenizer import SMALLEST_BPE
from hotlap.train.presets import PRETRAIN, TALKS, from_depth, gpt2_grade, gpt2_grade_sft, tiny, tiny_sft


@pytest.mark.parametrize(
    ("depth", "batch", "steps", "decay", "width"),
    [(12, 2**19, 2520, 0.28, 768), (20, 2**20, 4980, 0.100, 1280), (24, 2**20, 8352, 0.060, 1536)],
)
def test_depth_scales_as_in_nanochat(depth, batch, steps, decay, width):
    config = from_depth(depth)
    assert config.batch_rows * config.model.context == batch
    assert config.loop.steps == pytest.approx(steps, rel=1e-3)
    assert config.optim.weight_decay == pytest.approx(decay, abs=5e-4)
    assert config.model.width == width and config.model.layers == depth and config.model.head_dim == 128
    assert config.optim.matrix_lr == pytest.approx(0.02 * (batch / 2**19) ** 0.5)


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_preset_is_valid(name):
    config = PRETRAIN[name]()
    assert config.validate() == config
    assert config.tokenizer != "bpe" or config.model.vocab_size >= SMALLEST_BPE


@pytest.mark.parametrize("name", [name for name in PRETRAIN if name.endswith("-portable")])
def test_portable_presets_are_stock_and_otherwise_the_same(name):
    found, full = PRETRAIN[name](), PRETRAIN[name.removesuffix("-portable")]()
    assert stock_class(found.model) == "apertus" and found.out.parts[1] == name
    assert dataclasses.replace(found, out=full.out, model=full.model) == full


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 30])
def test_every_depth_is_valid(depth):
    from_depth(depth).validate()


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth=0"):
        from_depth(0)


def test_the_demo_fine_tunes_what_it_has_pretrained():
    base, tuned = tiny(), tiny_sft().validate()
    assert tuned.base == base.out != tuned.out and dataclasses.asdict(base)["data"] == "pydocs"


@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("talks", [TALKS, ("tasks", "smoltalk:0.5")])
def test_a_mixture_with_smoltalk_gets_one_epoch_with_the_batch_size_of_pretraining(depth, talks):
    base = gpt2_grade(depth)
    tuned = gpt2_grade_sft(base, talks).validate()
    assert tuned.base == base.out and tuned.batch_rows == base.batch_rows
    assert tuned.epochs == 1 and tuned.loop.steps == 1  # the pass decides
    assert tuned.optim.matrix_lr == pytest.approx(0.016) and tuned.optim.weight_decay == 0
    assert tuned.schedule.warmdown == 0.5 and tuned.schedule.final_lr == 0


def test_other_conversations_get_many_small_steps():
    tuned = gpt2_grade_sft(gpt2_grade(), ("tasks",)).validate()
    assert tuned.loop.steps == 500 and tuned.batch_rows == 16 and tuned.epochs == 1
